// Values under a bit mask. avx512.cpp includes this inside its namespace.

inline __m512i both_halves(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// 32 values of 16 bits to the places of a mask, by halves; moves on to the next values. Zen 4 takes twice as long for a whole register
// of them, or where the compiler has them expanded out of memory.
inline __m512i expand_32(const uint8_t*& values, uint32_t bits) {
  __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 2 * __builtin_popcount(bits & 0xffff)));
  __asm__("" : "+v"(low), "+v"(high));
  values += 2 * __builtin_popcount(bits);
  return both_halves(_mm256_maskz_expand_epi16(__mmask16(bits), low), _mm256_maskz_expand_epi16(__mmask16(bits >> 16), high));
}

// Values of 32 columns, in the order of the inputs that they are multiplied by: bfloat16 values are taken apart into even and odd
// columns, as `x_split` is.
enum class Kind { bf16, f16, f32 };

template <Kind kind>
inline void expand(const uint8_t*& values, uint32_t bits, __m512* w) {
  if constexpr (kind == Kind::f32) {
    w[0] = _mm512_maskz_expand_ps(__mmask16(bits), _mm512_loadu_ps(values));
    values += 4 * __builtin_popcount(bits & 0xffff);
    w[1] = _mm512_maskz_expand_ps(__mmask16(bits >> 16), _mm512_loadu_ps(values));
    values += 4 * __builtin_popcount(bits >> 16);
    return;
  }
  const __m512i both = expand_32(values, bits);
  if constexpr (kind == Kind::bf16) {
    w[0] = even_bf16(both);
    w[1] = odd_bf16(both);
  } else {
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
  }
}

template <Kind kind, int T, int R>
inline void sparse_rows(const Sparse& w, const Inputs& in, int64_t first, int64_t D, int64_t t0, float* y, int64_t O) {
  const int64_t B = (w.I + 7) / 8;
  const int64_t size = kind == Kind::f32 ? 4 : 2;
  const uint8_t *values[R], *mask[R];
  __m512 sum[R][T];
  for (int j = 0; j < R; j++) {
    values[j] = static_cast<const uint8_t*>(w.values.data) + w.start[first + j * D] * size;
    mask[j] = w.mask + (first + j * D) * B;
    for (int t = 0; t < T; t++) sum[j][t] = _mm512_setzero_ps();
  }
  const float* x = (kind == Kind::bf16 ? in.x_split : in.x) + t0 * in.stride;
  for (int64_t b = 0; b < B; b += 8, x += 64) {
    uint64_t bits[R];
    for (int j = 0; j < R; j++) {
      bits[j] = mask_word(mask[j], b, B);
      _mm_prefetch(reinterpret_cast<const char*>(values[j] + PREFETCH), _MM_HINT_T0);
    }
    // Unrolled, or the sums would be kept in memory.
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m512 xs[T][2];
      for (int t = 0; t < T; t++)
        for (int i = 0; i < 2; i++) xs[t][i] = _mm512_loadu_ps(x + t * in.stride + 32 * half + 16 * i);
#pragma GCC unroll 4
      for (int j = 0; j < R; j++) {
        __m512 weight[2];
        expand<kind>(values[j], uint32_t(bits[j] >> (32 * half)), weight);
        for (int t = 0; t < T; t++)
          for (int i = 0; i < 2; i++) sum[j][t] = _mm512_fmadd_ps(weight[i], xs[t][i], sum[j][t]);
      }
    }
  }
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++) y[(t0 + t) * O + first + j * D] = _mm512_reduce_add_ps(sum[j][t]);
}

#include "sparse_dot.inl"

// 16 values under a mask, wherever they lie; returns how many there were.
void sparse_row(const Sparse& w, int64_t r, float* row) {
  const int64_t B = (w.I + 7) / 8;
  int64_t v = w.start[r];
  for (int64_t b = 0; b < B; b += 8) {
    const uint64_t bits = mask_word(w.mask + r * B, b, B);
    for (int part = 0; part < 4 && 8 * b + 16 * part < w.I; part++) {
      const __mmask16 some = __mmask16(bits >> (16 * part));
      _mm512_storeu_ps(row + 8 * b + 16 * part, _mm512_maskz_expand_ps(some, load16(w.values, v)));
      v += __builtin_popcount(some);
    }
  }
}
