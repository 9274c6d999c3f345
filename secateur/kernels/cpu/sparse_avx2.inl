// Values under a bit mask. AVX2 cannot expand values under the bits of a mask, so each byte of the mask looks up how to shuffle
// eight values to their places. avx2.cpp includes this inside its namespace.

// For each byte of a mask, which of the next eight values comes to each of eight columns: in bytes of 16-bit values, and in
// numbers of 32-bit values. A high bit stands for a zero.
struct Places {
  uint8_t of_16[256][16] = {};
  uint8_t of_32[256][8] = {};
};

constexpr Places find_places() {
  Places places;
  for (int byte = 0; byte < 256; byte++)
    for (int i = 0, k = 0; i < 8; i++) {
      const bool set = byte >> i & 1;
      places.of_16[byte][2 * i] = set ? uint8_t(2 * k) : 128;
      places.of_16[byte][2 * i + 1] = set ? uint8_t(2 * k + 1) : 128;
      places.of_32[byte][i] = set ? uint8_t(k) : 128;
      k += set;
    }
  return places;
}

alignas(64) constexpr Places PLACES = find_places();

// Eight bytes of a mask, and how many values stand before each byte's first: one byte each.
struct MaskWord {
  uint64_t bits, before;

  explicit MaskWord(uint64_t word) : bits(word) {
    uint64_t n = word - (word >> 1 & 0x5555555555555555);
    n = (n & 0x3333333333333333) + (n >> 2 & 0x3333333333333333);
    n = (n + (n >> 4)) & 0x0f0f0f0f0f0f0f0f;
    before = n * 0x0101010101010101 << 8;
  }

  int64_t count() const { return __builtin_popcountll(bits); }
  unsigned byte(int b) const { return bits >> (8 * b) & 255; }
  // At most 4 · 56 bytes: the product stays within its byte.
  template <int size>
  int64_t offset(int b) const { return before * size >> (8 * b) & 255; }
};

inline __m128i expand_16(const uint8_t* values, const MaskWord& word, int b) {
  return _mm_shuffle_epi8(load_whole(values + word.offset<2>(b)), load_whole(PLACES.of_16[word.byte(b)]));
}

// Of two bytes' columns.
inline __m256i expand_pair(const uint8_t* values, const MaskWord& word, int b) {
  const __m256i found = _mm256_inserti128_si256(_mm256_castsi128_si256(load_whole(values + word.offset<2>(b))),
                                                load_whole(values + word.offset<2>(b + 1)), 1);
  const __m256i places = _mm256_inserti128_si256(_mm256_castsi128_si256(load_whole(PLACES.of_16[word.byte(b)])),
                                                 load_whole(PLACES.of_16[word.byte(b + 1)]), 1);
  return _mm256_shuffle_epi8(found, places);
}

inline __m256 expand_32(const uint8_t* values, const MaskWord& word, int b) {
  const __m256i places = _mm256_cvtepi8_epi32(load_half(PLACES.of_32[word.byte(b)]));
  const __m256 found = _mm256_loadu_ps(reinterpret_cast<const float*>(values + word.offset<4>(b)));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(found, places), _mm256_setzero_ps(), _mm256_castsi256_ps(places));
}

enum class Kind { bf16, f16, f32 };

// The weights of 32 columns, from those of byte b of the mask on: in the order of `x_split` for bfloat16, of `x` otherwise.
template <Kind kind>
inline void expand(const uint8_t* values, const MaskWord& word, int b, __m256* w) {
  if constexpr (kind == Kind::bf16) {
    const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
    for (int i = 0; i < 2; i++) {
      const __m256i both = expand_pair(values, word, b + 2 * i);
      w[i] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      w[i + 2] = _mm256_castsi256_ps(_mm256_and_si256(both, odd));
    }
  } else {
    for (int i = 0; i < 4; i++) {
      if constexpr (kind == Kind::f16)
        w[i] = _mm256_cvtph_ps(expand_16(values, word, b + i));
      else
        w[i] = expand_32(values, word, b + i);
    }
  }
}

// R rows, D apart, with T tokens.
template <Kind kind, int T, int R>
void sparse_rows(const Sparse& w, const Inputs& in, int64_t first, int64_t D, int64_t t0, float* y, int64_t O) {
  constexpr int size = kind == Kind::f32 ? 4 : 2;
  const int64_t B = (w.I + 7) / 8;
  const uint8_t *values[R], *mask[R];
  __m256 sum[R][T][2];
  for (int j = 0; j < R; j++) {
    values[j] = static_cast<const uint8_t*>(w.values.data) + w.start[first + j * D] * size;
    mask[j] = w.mask + (first + j * D) * B;
    for (int t = 0; t < T; t++) sum[j][t][0] = sum[j][t][1] = _mm256_setzero_ps();
  }
  const float* x = (kind == Kind::bf16 ? in.x_split : in.x) + t0 * in.stride;
  for (int64_t b = 0; b < B; b += 8, x += 64) {
    // Unrolled, or the sums would be kept in memory.
#pragma GCC unroll 2
    for (int j = 0; j < R; j++) {
      const MaskWord word(mask_word(mask[j], b, B));
      _mm_prefetch(reinterpret_cast<const char*>(values[j] + PREFETCH), _MM_HINT_T0);
      for (int half = 0; half < 2; half++) {
        __m256 weight[4];
        expand<kind>(values[j], word, 4 * half, weight);
        for (int t = 0; t < T; t++)
          for (int i = 0; i < 4; i++) {
            const __m256 xs = _mm256_loadu_ps(x + t * in.stride + 32 * half + 8 * i);
            sum[j][t][i & 1] = _mm256_fmadd_ps(weight[i], xs, sum[j][t][i & 1]);
          }
      }
      values[j] += word.count() * size;
    }
  }
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++)
      y[(t0 + t) * O + first + j * D] = reduce_add(_mm256_add_ps(sum[j][t][0], sum[j][t][1]));
}

#include "sparse_dot.inl"

// Values of a row to their columns.
inline void place(const uint8_t* mask, int64_t I, const void* stored, Float dtype, float* row) {
  const int64_t B = (I + 7) / 8;
  const uint8_t* values = static_cast<const uint8_t*>(stored);
  for (int64_t b = 0; b < B; b += 8) {
    const MaskWord word(mask_word(mask, b, B));
    for (int i = 0; i < 8 && b + i < B; i++) {
      const __m256 w = dtype == Float::f32 ? expand_32(values, word, i) : widen(expand_16(values, word, i), dtype);
      _mm256_storeu_ps(row + 8 * (b + i), w);
    }
    values += word.count() * (dtype == Float::f32 ? 4 : 2);
  }
}

void sparse_row(const Sparse& w, int64_t r, float* row) {
  const int64_t size = w.values.dtype == Float::f32 ? 4 : 2;
  place(w.mask + r * ((w.I + 7) / 8), w.I, static_cast<const uint8_t*>(w.values.data) + w.start[r] * size, w.values.dtype, row);
}
