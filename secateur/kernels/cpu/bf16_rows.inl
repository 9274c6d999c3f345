// Rows unpacked to bfloat16, some columns at a time, for `Products`: what many tokens are multiplied by. avx512.cpp includes this
// inside its namespace.

#include "nearest_bf16.inl"

// How far ahead codes are fetched.
constexpr int64_t ROWS_AHEAD = 4;

void sparse_bf16(const Sparse& w, int64_t first, int64_t last, int64_t k0, int64_t k1, int64_t* at, uint16_t* to, int64_t stride) {
  const int64_t B = (w.I + 7) / 8;
  for (int64_t r = first; r < last; r++, at++, to += stride) {
    if (k0 == 0) *at = w.start[r];
    const uint8_t* const start = static_cast<const uint8_t*>(w.values.data);
    const uint8_t* values = start + 2 * *at;
    for (int64_t k = k0; k < k1; k += 64) {
      const uint64_t bits = mask_word(w.mask + r * B, k / 8, B);
      _mm_prefetch(reinterpret_cast<const char*>(values + PREFETCH), _MM_HINT_T0);
      _mm512_storeu_si512(to + k - k0, expand_32(values, uint32_t(bits)));
      // Beyond the last columns no bits are set.
      const __m512i rest = expand_32(values, uint32_t(bits >> 32));
      if (k + 32 < k1) _mm512_storeu_si512(to + k - k0 + 32, rest);
    }
    *at = (values - start) / 2;
  }
}

// The 32 codes that begin at p, in words whose higher bits mean nothing: both bytes that a code may lie in, shifted.
struct Words {
  __m512i byte, shift;
  explicit Words(int bits) {
    alignas(64) uint8_t bytes[64];
    alignas(64) uint16_t shifts[32];
    for (int j = 0; j < 32; j++) {
      bytes[2 * j] = uint8_t(j * bits / 8);
      bytes[2 * j + 1] = uint8_t(j * bits / 8 + 1);
      shifts[j] = uint16_t(j * bits % 8);
    }
    byte = _mm512_load_si512(bytes);
    shift = _mm512_load_si512(shifts);
  }
  __m512i operator()(const uint8_t* p) const {
    const __m512i stream = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_srlv_epi16(_mm512_permutexvar_epi8(byte, stream), shift);
  }
};

// What codes of up to five bits stand for in a group, for `_mm512_permutexvar_epi16`, which looks at five bits.
class CodeValues {
 public:
  explicit CodeValues(int bits) : one_(bits < 5) {
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    low_ = _mm512_cvtepi32_ps(_mm512_and_si512(low, _mm512_set1_epi32((1 << bits) - 1)));
    high_ = _mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_set1_epi32(16)));
    alignas(64) uint16_t upper[32];
    for (int j = 0; j < 32; j++) upper[j] = uint16_t(2 * j + 1);
    upper_ = _mm512_load_si512(upper);
  }
  __m512i operator()(__m512 scale, __m512 zero) const {
    const __m512i low = rounded(_mm512_mul_ps(_mm512_sub_ps(low_, zero), scale));
    const __m512i high = one_ ? low : rounded(_mm512_mul_ps(_mm512_sub_ps(high_, zero), scale));
    return _mm512_permutex2var_epi16(low, upper_, high);
  }

 private:
  // The nearest bfloat16 in the upper halves, as `nearest_bf16` but for NaN, which no grid has.
  static __m512i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }

  bool one_;
  __m512 low_, high_;
  __m512i upper_;
};

inline __m512i row_table_bf16(const Coded& w, int64_t r) {
  alignas(64) uint16_t table[32];
  const int C = 1 << w.bits;
  for (int c = 0; c < 32; c++) table[c] = to_bf16(value_at(w.table, (r << w.bits) + (c & (C - 1))));
  return _mm512_load_si512(table);
}

// More than 32 values are computed one by one.
inline __m512i computed(__m512i codes, int bits, __m512 scale, __m512 zero) {
  const __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
  __m256i half[2];
  for (int j = 0; j < 2; j++) {
    const __m512i some = _mm512_cvtepu16_epi32(j ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes));
    half[j] = nearest_bf16(_mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(some, mask)), zero), scale));
  }
  return both_halves(half[0], half[1]);
}

// Whether `coded_bf16` unpacks it: groups begin at whole bytes, and all is in codes.
bool coded_bf16_takes(const Coded& w) {
  if (w.mask || w.outlier_start) return false;
  return w.table.data ? w.bits <= 5 : w.G == 1 || w.group_size % 8 == 0;
}

void coded_bf16(const Coded& w, int64_t first, int64_t last, int64_t k0, int64_t k1, uint16_t* to, int64_t stride, float* scratch) {
  const Words words(w.bits);
  const CodeValues values(w.bits);
  const int64_t Gs = round_up(w.G + WIDTH), end = k1 < w.I ? k1 : w.I;
  float *levels = scratch, *scale = levels + 4 * Gs, *zero = scale + Gs;
  const int64_t g0 = w.table.data ? 0 : k0 / w.group_size, g1 = w.table.data ? 0 : (end - 1) / w.group_size + 1;
  int64_t tile = -1;
  for (int64_t r = first; r < last; r++, to += stride) {
    const uint8_t* const codes = w.codes + w.start[r];
    // Rows are far from each other where not all of their columns are wanted: the processor does not foresee where it goes on.
    const uint8_t* const ahead = w.codes + w.start[r + ROWS_AHEAD < last ? r + ROWS_AHEAD : last - 1];
    for (int64_t b = k0 * w.bits / 8; b < end * w.bits / 8; b += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead + b), _MM_HINT_T0);
    if (w.table.data) {
      const __m512i table = row_table_bf16(w, r);
      for (int64_t k = k0; k < end; k += 32) _mm512_storeu_si512(to + k - k0, _mm512_permutexvar_epi16(words(codes + k * w.bits / 8), table));
    } else {
      if (w.second.data && r / w.tile_rows != tile) tile_levels(w, tile = r / w.tile_rows, levels, Gs);
      grid(w, groups_before(w, r) + g0, g1 - g0, levels + g0, Gs, scale, zero);
      for (int64_t g = g0, k = k0; k < end; g++) {
        const __m512 s = _mm512_set1_ps(scale[g - g0]), z = _mm512_set1_ps(zero[g - g0]);
        const int64_t stop = (g + 1) * w.group_size < end ? (g + 1) * w.group_size : end;
        // What is beyond the group is written over by the next.
        if (w.bits <= 5) {
          const __m512i table = values(s, z);
          for (; k < stop; k += 32) _mm512_storeu_si512(to + k - k0, _mm512_permutexvar_epi16(words(codes + k * w.bits / 8), table));
        } else {
          for (; k < stop; k += 32) _mm512_storeu_si512(to + k - k0, computed(words(codes + k * w.bits / 8), w.bits, s, z));
        }
        k = stop;
      }
    }
    // Nothing is added where there are no inputs.
    for (int64_t k = end; k < k1; k++) to[k - k0] = 0;
  }
}
