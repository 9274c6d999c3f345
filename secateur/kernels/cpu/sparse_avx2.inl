// Values under a bit mask. AVX2 cannot expand values under the bits of a mask, so each byte of the mask looks up how to shuffle
// eight values to their places. avx2.cpp includes this inside its namespace.

// Sums of a row that are added up apart, so that none waits for the one before it.
constexpr int SUMS = 2;

// For each byte of a mask, which of the next eight values comes to each of eight columns, in `size` bytes a column; a high bit
// stands for a zero.
template <int size>
struct Places {
  uint8_t entry[256 * 8 * size] = {};
};

// In bytes of 16-bit values, to the upper ones of `size` bytes: there a bfloat16 is a float32.
template <int size>
constexpr Places<size> bytes_of_16() {
  Places<size> places;
  for (int byte = 0; byte < 256; byte++)
    for (int i = 0, k = 0; i < 8; k += byte >> i & 1, i++)
      for (int n = 0; n < size; n++)
        places.entry[(byte * 8 + i) * size + n] = byte >> i & 1 && n >= size - 2 ? uint8_t(2 * k + n - (size - 2)) : 128;
  return places;
}

// In numbers of 32-bit values.
constexpr Places<1> numbers() {
  Places<1> places;
  for (int byte = 0; byte < 256; byte++)
    for (int i = 0, k = 0; i < 8; k += byte >> i & 1, i++) places.entry[byte * 8 + i] = byte >> i & 1 ? uint8_t(k) : 128;
  return places;
}

alignas(64) constexpr Places<4> PLACES_BF16 = bytes_of_16<4>();
alignas(64) constexpr Places<2> PLACES_F16 = bytes_of_16<2>();
alignas(64) constexpr Places<1> PLACES_F32 = numbers();

enum class Kind { bf16, f16, f32 };

// Rotated, which is one instruction where a shift of a copy is two.
inline uint64_t turned_down(uint64_t word, int bits) { return word >> (bits & 63) | word << (-bits & 63); }

// The weights of the eight columns of byte b of a word of a mask, whose values are the next ones: `values` goes on to those after.
// Where they end is counted, not loaded, so that loads do not wait for each other.
template <Kind kind>
inline __m256 expand(const uint8_t*& values, uint64_t word, int b) {
  // The byte, times the bytes that it has in its table.
  constexpr int entry = kind == Kind::bf16 ? 5 : kind == Kind::f16 ? 4 : 3;
  const uint64_t at = turned_down(word, 8 * b - entry) & 255 << entry;
  const uint8_t* next = values;
  values += __builtin_popcountll(at) * (kind == Kind::f32 ? 4 : 2);
  if constexpr (kind == Kind::bf16) {
    // Both halves of the vector have the eight values, of which each takes its own.
    const __m256i found = _mm256_broadcastsi128_si256(load_whole(next));
    const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(PLACES_BF16.entry + at));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(found, places));
  } else if constexpr (kind == Kind::f16) {
    return _mm256_cvtph_ps(_mm_shuffle_epi8(load_whole(next), load_whole(PLACES_F16.entry + at)));
  } else {
    const __m256i places = _mm256_cvtepi8_epi32(load_half(PLACES_F32.entry + at));
    const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(next)), places);
    return _mm256_blendv_ps(found, _mm256_setzero_ps(), _mm256_castsi256_ps(places));
  }
}

// R rows, D apart, with T tokens.
template <Kind kind, int T, int R>
void sparse_rows(const Sparse& w, const Inputs& in, int64_t first, int64_t D, int64_t t0, float* y, int64_t O) {
  constexpr int size = kind == Kind::f32 ? 4 : 2;
  const int64_t B = (w.I + 7) / 8;
  const uint8_t *values[R], *mask[R];
  __m256 sum[R][T][SUMS];
  for (int j = 0; j < R; j++) {
    values[j] = static_cast<const uint8_t*>(w.values.data) + w.start[first + j * D] * size;
    mask[j] = w.mask + (first + j * D) * B;
    for (int t = 0; t < T; t++)
      for (int i = 0; i < SUMS; i++) sum[j][t][i] = _mm256_setzero_ps();
  }
  const float* x = in.x + t0 * in.stride;
  for (int64_t b = 0; b < B; b += 8, x += 64) {
    uint64_t word[R];
    for (int j = 0; j < R; j++) {
      word[j] = mask_word(mask[j], b, B);
      _mm_prefetch(reinterpret_cast<const char*>(values[j] + PREFETCH), _MM_HINT_T0);
    }
    // Unrolled, or the sums would be kept in memory.
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      __m256 weight[R];
      for (int j = 0; j < R; j++) weight[j] = expand<kind>(values[j], word[j], i);
      for (int t = 0; t < T; t++) {
        __m256 xs = _mm256_loadu_ps(x + t * in.stride + 8 * i);
        // Loaded once for all rows: loads are what these kernels have most of, and a compiler takes one more for free.
        if (R > 1) asm("" : "+x"(xs));
        for (int j = 0; j < R; j++) sum[j][t][i % SUMS] = _mm256_fmadd_ps(weight[j], xs, sum[j][t][i % SUMS]);
      }
    }
  }
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++) {
      __m256 all = sum[j][t][0];
      for (int i = 1; i < SUMS; i++) all = _mm256_add_ps(all, sum[j][t][i]);
      y[(t0 + t) * O + first + j * D] = reduce_add(all);
    }
}

#include "sparse_dot.inl"

// Values of a row to their columns.
template <Kind kind>
void place(const uint8_t* mask, int64_t I, const uint8_t* values, float* row) {
  const int64_t B = (I + 7) / 8;
  for (int64_t b = 0; b < B; b += 8) {
    const uint64_t word = mask_word(mask, b, B);
    for (int i = 0; i < 8 && b + i < B; i++) _mm256_storeu_ps(row + 8 * (b + i), expand<kind>(values, word, i));
  }
}

void sparse_row(const Sparse& w, int64_t r, float* row) {
  const uint8_t* const values = static_cast<const uint8_t*>(w.values.data) + w.start[r] * (w.values.dtype == Float::f32 ? 4 : 2);
  const uint8_t* const mask = w.mask + r * ((w.I + 7) / 8);
  if (w.values.dtype == Float::f32) return place<Kind::f32>(mask, w.I, values, row);
  if (w.values.dtype == Float::f16) return place<Kind::f16>(mask, w.I, values, row);
  place<Kind::bf16>(mask, w.I, values, row);
}
