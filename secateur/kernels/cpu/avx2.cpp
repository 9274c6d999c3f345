// The kernels for processors with AVX2, F16C and FMA: x86-64-v3, nearly all since 2013. Inputs and sums are float32 whatever
// the inputs were.
//
// Eight codes of up to four bits lie in one 32-bit word: each lane has a copy of it and shifts its own code down.
// vpermps, which looks only at the low three bits of a lane, then finds what it stands for.

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <utility>

#include "columns.h"
#include "plain.h"
#include "step.h"
#include "trellis.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif

namespace secateur {
namespace {

// How far ahead values and codes are fetched, in bytes.
constexpr int PREFETCH = 2048;
// For one token so many rows are done side by side. They lie far from each other: the processor's own prefetcher follows two
// streams in different pages, not in one.
constexpr int ROWS = 2;
static_assert(ROWS <= MOST_ROWS);

inline __m128i load_half(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m128i load_whole(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline __m256 widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline __m256 widen(__m128i v, Float dtype) { return dtype == Float::bf16 ? widen_bf16(v) : _mm256_cvtph_ps(v); }

inline __m128 load_4(Floats v, int64_t at) {
  if (v.dtype == Float::f32) return _mm_loadu_ps(static_cast<const float*>(v.data) + at);
  const __m128i half = load_half(static_cast<const uint16_t*>(v.data) + at);
  if (v.dtype == Float::f16) return _mm_cvtph_ps(half);
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}

// All ones in the first n of 8 lanes.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? int(n) : 8), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The first n of 8 elements of up to two bytes, and zeros; nothing behind them is read.
inline __m128i load_some(const void* p, int64_t n, int64_t size) {
  if (n >= 8) return size == 2 ? load_whole(p) : load_half(p);
  __m128i some = _mm_setzero_si128();
  std::memcpy(&some, p, n * size);
  return some;
}

inline __m256 load_some(Floats v, int64_t at, int64_t n) {
  if (v.dtype == Float::f32) return _mm256_maskload_ps(static_cast<const float*>(v.data) + at, first_lanes(n));
  return widen(load_some(static_cast<const uint16_t*>(v.data) + at, n, 2), v.dtype);
}

inline float reduce_add(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// --- values under a bit mask

#include "sparse_avx2.inl"

// --- codes

// By how much each lane shifts to get at its code: see `codes_8`.
inline __m256i shifts_8(int bits) {
  const int upper = bits <= 4 ? 4 * bits : 4 * bits & 7;
  return _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, upper, upper + bits, upper + 2 * bits, upper + 3 * bits);
}

inline __m256i word_32(const uint8_t* p) {
  int word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Eight codes in the low bits of as many lanes; above them lie bits of the next ones. Those of more than four bits are in two
// words of four codes.
inline __m256i codes_8(const uint8_t* p, int bits, __m256i shifts) {
  __m256i words = word_32(p);
  if (bits > 4) words = _mm256_blend_epi32(words, word_32(p + 4 * bits / 8), 0xf0);
  return _mm256_srlv_epi32(words, shifts);
}

// What codes stand for in a row: their numbers, or the entries of its table.
struct Meaning {
  bool is_table;
  __m256 low, high;  // of codes up to 7, and from 8 to 15

  Meaning(const Coded& w, int64_t r) : is_table(w.table.data) {
    alignas(32) float entries[16];
    const int last = (1 << w.bits) - 1;
    for (int c = 0; c < 16; c++)
      entries[c] = is_table && w.bits <= 4 ? value_at(w.table, (r << w.bits) + (c & last)) : float(c & last);
    low = _mm256_load_ps(entries);
    high = _mm256_load_ps(entries + 8);
  }

  // Of up to seven bits, with other bits above them; of a table, of up to four.
  __m256 operator()(__m256i codes, int bits) const {
    if (bits > 4) return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << bits) - 1)));
    if (bits <= 3) return _mm256_permutevar8x32_ps(low, codes);
    if (!is_table) return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15)));
    const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), fourth_bit);
  }
};

inline __m256 bytes_8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_half(p))); }

// What the codes of a row are, as numbers, or what they stand for where there is a table.
inline void code_values(const Coded& w, int64_t r, int64_t K, float* out) {
  const uint8_t* p = w.codes + w.start[r];
  const __m256i shifts = shifts_8(w.bits);
  if (w.bits <= 4) {
    const Meaning meaning(w, r);
    for (int64_t k = 0; k < K; k += 8, p += w.bits) _mm256_storeu_ps(out + k, meaning(codes_8(p, w.bits, shifts), w.bits));
  } else if (!w.table.data) {
    const __m256i low_bits = _mm256_set1_epi32((1 << w.bits) - 1);
    for (int64_t k = 0; k < K; k += 8, p += w.bits)
      _mm256_storeu_ps(out + k, _mm256_cvtepi32_ps(_mm256_and_si256(codes_8(p, w.bits, shifts), low_bits)));
  } else {
    for (int64_t k = 0; k < K; k++) out[k] = value_at(w.table, (r << w.bits) + code_at(p, w.bits, k));
  }
}

// The second level of a tile as four rows of floats, each `second_groups` long: it serves all rows of the tile.
inline void tile_levels(const Coded& w, int64_t tile, float* level, int64_t stride) {
  const int64_t G = w.second_groups;
  for (int64_t g = 0; g < G; g += 4) {
    __m128 row[4];
    for (int j = 0; j < 4; j++) row[j] = g + j < G ? load_4(w.second, 4 * (tile * G + g + j)) : _mm_setzero_ps();
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    for (int j = 0; j < 4; j++) _mm_storeu_ps(level + j * stride + g, row[j]);
  }
}

struct Grid8 {
  __m256 scale, zero;
};

// Scales and zero points of 8 groups of a row, or of `left` at its end, with zeros after them. `at` counts the groups of all rows,
// g those of this one.
template <bool end>
inline Grid8 grid_8(const Coded& w, int64_t at, int64_t g, int64_t left, const float* level, int64_t stride) {
  if (!end) left = 8;
  __m256 s, z;
  if (w.scale.data) {
    s = load_some(w.scale, at, left);
    z = _mm256_set1_ps(float(1 << (w.bits - 1)));
    if (w.zero) z = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_some(w.zero + at, left, 1)));
    if (w.level.data) z = load_some(w.level, at, left);
  } else {
    __m256i c, d;
    if (w.nibbles) {
      const __m256i both = _mm256_cvtepu8_epi32(load_some(w.pair + at, left, 1));
      c = _mm256_and_si256(both, _mm256_set1_epi32(15));
      d = _mm256_srli_epi32(both, 4);
    } else {
      const __m256i both = _mm256_cvtepu16_epi32(load_some(w.pair + 2 * at, left, 2));
      c = _mm256_and_si256(both, _mm256_set1_epi32(255));
      d = _mm256_srli_epi32(both, 8);
    }
    level += g;
    s = _mm256_fmadd_ps(_mm256_loadu_ps(level), _mm256_cvtepi32_ps(c), _mm256_loadu_ps(level + stride));
    z = _mm256_fmadd_ps(_mm256_loadu_ps(level + 2 * stride), _mm256_cvtepi32_ps(d), _mm256_loadu_ps(level + 3 * stride));
  }
  if (!end) return {s, z};
  const __m256 there = _mm256_castsi256_ps(first_lanes(left));
  return {_mm256_and_ps(s, there), _mm256_and_ps(z, there)};
}

// The same for all n groups of a row, from that of number `at` on.
inline void grid(const Coded& w, int64_t at, int64_t n, const float* level, int64_t stride, float* scale, float* zero) {
  for (int64_t g = 0; g < n; g += 8) {
    const Grid8 found = g + 8 <= n ? grid_8<false>(w, at + g, g, 8, level, stride) : grid_8<true>(w, at + g, g, n - g, level, stride);
    _mm256_storeu_ps(scale + g, found.scale);
    _mm256_storeu_ps(zero + g, found.zero);
  }
}

// Numbers to weights, in place.
inline void apply_grid(int64_t K, int64_t group_size, const float* scale, const float* zero, float* w) {
  for (int64_t g = 0, k = 0; k < K; g++) {
    const __m256 s = _mm256_set1_ps(scale[g]), z = _mm256_set1_ps(zero[g]);
    const int64_t end = k + group_size < K ? k + group_size : K;
    for (; k + 8 <= end; k += 8) _mm256_storeu_ps(w + k, _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w + k), z), s));
    for (; k < end; k++) w[k] = (w[k] - zero[g]) * scale[g];
  }
}

// `levels` of the row's tile, see `tile_levels`. scratch: the stored weights, then scales and zero points.
inline void one_row(const Coded& w, int64_t r, const float* levels, float* row, float* scratch) {
  const int64_t K = stored_of(w, r), Gs = round_up(w.G + WIDTH);
  float* stored = w.mask ? scratch : row;
  code_values(w, r, K, stored);
  if (!w.table.data) {
    float *scale = scratch + round_up(w.I), *zero = scale + Gs;
    grid(w, groups_before(w, r), (K + w.group_size - 1) / w.group_size, levels, Gs, scale, zero);
    apply_grid(K, w.group_size, scale, zero, stored);
  }
  if (w.mask) place<Kind::f32>(w.mask + r * ((w.I + 7) / 8), w.I, reinterpret_cast<const uint8_t*>(stored), row);
  add_outliers(w, r, row);
}

void coded_row(const Coded& w, int64_t r, float* row, float* scratch) {
  const int64_t Gs = round_up(w.G + WIDTH);
  float* levels = scratch + round_up(w.I) + 2 * Gs;
  if (w.second.data) tile_levels(w, r / w.tile_rows, levels, Gs);
  one_row(w, r, levels, row, scratch);
}

inline float dot(const float* a, const float* b, int64_t n) {
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int j = 0; j < 4; j++)
      sum[j] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * j), _mm256_loadu_ps(b + i + 8 * j), sum[j]);
  for (; i < n; i += 8) {
    const __m256i some = first_lanes(n - i);
    sum[0] = _mm256_fmadd_ps(_mm256_maskload_ps(a + i, some), _mm256_maskload_ps(b + i, some), sum[0]);
  }
  return reduce_add(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}

// What outliers add. Inputs are fetched one by one: gathers are slow on many of these processors.
inline float some_outliers(const Coded& w, int64_t r, const float* x) {
  if (!w.outlier_start) return 0;
  __m256 sum = _mm256_setzero_ps();
  const int64_t end = w.outlier_start[r + 1];
  int64_t n = w.outlier_start[r];
  for (; n + 8 <= end; n += 8) {
    const int32_t* at = w.outlier_column + n;
    const __m256 xs = _mm256_setr_ps(x[at[0]], x[at[1]], x[at[2]], x[at[3]], x[at[4]], x[at[5]], x[at[6]], x[at[7]]);
    sum = _mm256_fmadd_ps(xs, load_some(w.outlier_value, n, 8), sum);
  }
  float rest = 0;
  for (; n < end; n++) rest += value_at(w.outlier_value, n) * x[w.outlier_column[n]];
  return reduce_add(sum) + rest;
}

#include "fused_avx2.inl"
#include "turned_groups_avx2.inl"

void coded_dot(const Coded& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O, float* scratch) {
  if (turned_takes(w, in)) return any_turned_dot(w, in, first, last, y, O, scratch);
  if (!w.mask && (w.table.data || w.group_size >= w.I || w.group_size % 16 == 0)) {
    if (w.bits == 2) return fused<2>(w, in, first, last, y, O, scratch);
    if (w.bits == 3) return fused<3>(w, in, first, last, y, O, scratch);
    if (w.bits == 4) return fused<4>(w, in, first, last, y, O, scratch);
    if (w.bits == 5 && !w.table.data) return fused<5>(w, in, first, last, y, O, scratch);
    if (w.bits == 6 && !w.table.data) return fused<6>(w, in, first, last, y, O, scratch);
    if (w.bits == 7 && !w.table.data) return fused<7>(w, in, first, last, y, O, scratch);
    if (w.bits == 8 && !w.table.data) return fused<8>(w, in, first, last, y, O, scratch);
  }
  const int64_t Gs = round_up(w.G + WIDTH);
  float *row = scratch, *spare = row + round_up(w.I), *levels = spare + round_up(w.I) + 2 * Gs;
  int64_t tile = -1;
  for (int64_t r = first; r < last; r++) {
    if (w.second.data && r / w.tile_rows != tile) tile_levels(w, tile = r / w.tile_rows, levels, Gs);
    one_row(w, r, levels, row, spare);
    for (int64_t t = 0; t < in.T; t++) y[t * O + r] = dot(row, in.x + t * in.stride, w.I);
  }
}

void row_to_bf16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 value = _mm256_loadu_ps(from + i);
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i all = _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
}

// --- weights by input feature

#include "columns_avx2.inl"

// --- what comes between products

#include "step_math.inl"

const Kernels kernels = {"AVX2", sparse_dot, sparse_row, coded_dot, coded_row, row_to_bf16, &trellis_avx2, &column_kernels, &step_kernels};

}  // namespace
}  // namespace secateur

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace secateur {
const Kernels* avx2_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
      !__builtin_cpu_supports("popcnt") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2"))
    return nullptr;
  return &kernels;
}
}  // namespace secateur

#else
namespace secateur {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace secateur
#endif
