// The kernels for processors with AVX-512 as of Ice Lake (VBMI, VBMI2, VNNI). Inputs and sums are float32 whatever the inputs were:
// bfloat16 products (vdpbf16ps) were measured and are no faster.
//
// Bits of a mask expand values in one instruction (vpexpandw, vpexpandd). Codes of up to four bits are taken from any bit of a
// quadword, eight bits at a time (vpmultishiftqb). They become numbers as the highest bits of a float's fraction, or choose among
// the 16 entries of a register (vpermps), of which the high bits, that belong to the next code, do not count: entries repeat.

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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,bmi2,popcnt,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,bmi2,popcnt,fma,f16c")
#endif

namespace secateur {
namespace {

// How far ahead values and codes are fetched, in bytes.
constexpr int PREFETCH = 1024;
// For one token so many rows are done side by side. They lie far from each other: the processor's own prefetcher follows
// several streams in different pages, not in one.
constexpr int ROWS = MOST_ROWS;

inline __m512 even_bf16(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline __m512 odd_bf16(__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000)))); }
inline __m512 widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

inline __m512 load16(Floats v, int64_t at) {
  if (v.dtype == Float::f32) return _mm512_loadu_ps(static_cast<const float*>(v.data) + at);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(v.data) + at));
  return v.dtype == Float::bf16 ? widen_bf16(half) : _mm512_cvtph_ps(half);
}

// The first n of 16 values; nothing behind them is read.
inline __m512 load_some(Floats v, int64_t at, int64_t n) {
  const __mmask16 some = n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
  if (v.dtype == Float::f32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(v.data) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(v.data) + at);
  return v.dtype == Float::bf16 ? widen_bf16(half) : _mm512_cvtph_ps(half);
}

// --- values under a bit mask

#include "sparse_avx512.inl"

// --- codes

// Of the quadwords of `quads`, the bytes that begin at each of 16 codes, in the low bytes of doublewords.
inline __m512i shifts_16(int bits) {
  alignas(64) uint8_t at[64] = {};
  for (int j = 0; j < 16; j++) at[4 * j] = uint8_t(bits * (bits <= 4 ? j : j % 8));
  return _mm512_load_si512(at);
}

inline __m512i quad(const uint8_t* p) {
  return _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// The quadwords that 16 codes lie in: one, or one for each eight codes of more than four bits.
inline __m512i quads(const uint8_t* p, int bits) {
  if (bits <= 4) return quad(p);
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + bits));
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_broadcastq_epi64(low)), _mm256_broadcastq_epi64(high), 1);
}

inline __m512 codes_16(const uint8_t* p, __m512i shifts, __m512 table) {
  return _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(shifts, quad(p)), table);
}

inline __m512 bytes_16(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline __m512 numbers_table(int bits) {
  alignas(64) float table[16];
  for (int c = 0; c < 16; c++) table[c] = float(c & ((1 << bits) - 1));
  return _mm512_load_ps(table);
}

// Row r's lookup table, repeated where it has fewer than 16 entries.
inline __m512 row_table(const Coded& w, int64_t r) {
  alignas(64) float table[16];
  const int C = 1 << w.bits;
  for (int c = 0; c < 16; c++) table[c] = value_at(w.table, (r << w.bits) + (c & (C - 1)));
  return _mm512_load_ps(table);
}

// What the codes of a row are, as numbers, or what they stand for where there is a table.
inline void code_values(const Coded& w, int64_t r, int64_t K, float* out) {
  const uint8_t* p = w.codes + w.start[r];
  if (w.bits <= 4) {
    const __m512 table = w.table.data ? row_table(w, r) : numbers_table(w.bits);
    const __m512i shifts = shifts_16(w.bits);
    for (int64_t k = 0; k < K; k += 16, p += 2 * w.bits) _mm512_storeu_ps(out + k, codes_16(p, shifts, table));
  } else if (w.table.data) {
    for (int64_t k = 0; k < K; k++) out[k] = value_at(w.table, (r << w.bits) + code_at(p, w.bits, k));
  } else if (w.bits == 8) {
    for (int64_t k = 0; k < K; k += 16) _mm512_storeu_ps(out + k, bytes_16(p + k));
  } else {
    const __m512i shifts = shifts_16(w.bits), low_bits = _mm512_set1_epi32((1 << w.bits) - 1);
    for (int64_t k = 0; k < K; k += 16, p += 2 * w.bits) {
      const __m512i codes = _mm512_multishift_epi64_epi8(shifts, quads(p, w.bits));
      _mm512_storeu_ps(out + k, _mm512_cvtepi32_ps(_mm512_and_si512(codes, low_bits)));
    }
  }
}

// The second level of a tile as four rows of floats, each `second_groups` long: it serves all rows of the tile.
inline void tile_levels(const Coded& w, int64_t tile, float* level, int64_t stride) {
  const int64_t G = w.second_groups;
  const __m512i by_four = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (int64_t g = 0; g < G; g += 4) {
    const __m512 four = load_some(w.second, 4 * (tile * G + g), 4 * (G - g));
    const __m512 sorted = _mm512_permutexvar_ps(by_four, four);
    _mm_storeu_ps(level + g, _mm512_castps512_ps128(sorted));
    _mm_storeu_ps(level + stride + g, _mm512_extractf32x4_ps(sorted, 1));
    _mm_storeu_ps(level + 2 * stride + g, _mm512_extractf32x4_ps(sorted, 2));
    _mm_storeu_ps(level + 3 * stride + g, _mm512_extractf32x4_ps(sorted, 3));
  }
}

// Scales and zero points of 16 groups of a row, or of fewer at its end, with zeros after them. `at` counts the groups of all
// rows, g those of this one.
template <bool end>
inline void grid_16(const Coded& w, int64_t at, int64_t g, int64_t n, const float* level, int64_t stride, __m512& scale, __m512& zero) {
  const __mmask16 some = end ? __mmask16((1u << n) - 1) : __mmask16(0xffff);
  __m512 s, z;
  if (w.scale.data) {
    s = end ? load_some(w.scale, at, n) : load16(w.scale, at);
    z = _mm512_set1_ps(float(1 << (w.bits - 1)));
    if (w.zero) z = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, w.zero + at)));
    if (w.level.data) z = end ? load_some(w.level, at, n) : load16(w.level, at);
  } else {
    __m512i c, d;
    if (w.nibbles) {
      const __m512i both = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, w.pair + at));
      c = _mm512_and_si512(both, _mm512_set1_epi32(15));
      d = _mm512_srli_epi32(both, 4);
    } else {
      const __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, w.pair + 2 * at));
      c = _mm512_and_si512(both, _mm512_set1_epi32(255));
      d = _mm512_srli_epi32(both, 8);
    }
    level += g;
    s = _mm512_fmadd_ps(_mm512_loadu_ps(level), _mm512_cvtepi32_ps(c), _mm512_loadu_ps(level + stride));
    z = _mm512_fmadd_ps(_mm512_loadu_ps(level + 2 * stride), _mm512_cvtepi32_ps(d), _mm512_loadu_ps(level + 3 * stride));
  }
  scale = end ? _mm512_maskz_mov_ps(some, s) : s;
  zero = end ? _mm512_maskz_mov_ps(some, z) : z;
}

// Calls `body(g, scale, zero)` for all n groups of a row, 16 at a time, from that of number `at` on.
template <class Body>
inline void for_grid(const Coded& w, int64_t at, int64_t n, const float* level, int64_t stride, const Body& body) {
  __m512 s, z;
  int64_t g = 0;
  for (; g + 16 <= n; g += 16) {
    grid_16<false>(w, at + g, g, 16, level, stride, s, z);
    body(g, s, z);
  }
  if (g == n) return;
  grid_16<true>(w, at + g, g, n - g, level, stride, s, z);
  body(g, s, z);
}

inline void grid(const Coded& w, int64_t at, int64_t n, const float* level, int64_t stride, float* scale, float* zero) {
  for_grid(w, at, n, level, stride, [&](int64_t g, __m512 s, __m512 z) {
    _mm512_storeu_ps(scale + g, s);
    _mm512_storeu_ps(zero + g, z);
  });
}

// Numbers to weights, in place.
inline void apply_grid(int64_t K, int64_t group_size, const float* scale, const float* zero, float* w) {
  for (int64_t g = 0, k = 0; k < K; g++) {
    const __m512 s = _mm512_set1_ps(scale[g]), z = _mm512_set1_ps(zero[g]);
    const int64_t end = k + group_size < K ? k + group_size : K;
    for (; k + 16 <= end; k += 16)
      _mm512_storeu_ps(w + k, _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w + k), z), s));
    if (k < end) {
      const __mmask16 some = __mmask16((1u << (end - k)) - 1);
      const __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, w + k), z), s);
      _mm512_mask_storeu_ps(w + k, some, v);
      k = end;
    }
  }
}

// The products of T tokens with a row of which the values of `stored` are kept.
template <int T>
inline void masked_dot(const uint8_t* mask, int64_t I, const float* stored, const Inputs& in, int64_t t0, float* y, int64_t O) {
  const int64_t B = (I + 7) / 8;
  const float* x = in.x + t0 * in.stride;
  __m512 sum[T];
  for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < B; b += 8, x += 64) {
    const uint64_t bits = mask_word(mask, b, B);
    for (int part = 0; part < 4; part++) {
      const __mmask16 some = __mmask16(bits >> (16 * part));
      const __m512 w = _mm512_maskz_expand_ps(some, _mm512_loadu_ps(stored));
      stored += __builtin_popcount(some);
      for (int t = 0; t < T; t++) sum[t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + t * in.stride + 16 * part), sum[t]);
    }
  }
  for (int t = 0; t < T; t++) y[(t0 + t) * O] = _mm512_reduce_add_ps(sum[t]);
}

inline void place(const uint8_t* mask, int64_t I, const float* stored, float* row) {
  const int64_t B = (I + 7) / 8;
  for (int64_t b = 0; b < B; b += 8) {
    const uint64_t bits = mask_word(mask, b, B);
    for (int part = 0; part < 4 && 8 * b + 16 * part < I; part++) {
      const __mmask16 some = __mmask16(bits >> (16 * part));
      _mm512_storeu_ps(row + 8 * b + 16 * part, _mm512_maskz_expand_ps(some, _mm512_loadu_ps(stored)));
      stored += __builtin_popcount(some);
    }
  }
}

// What row r stores. `levels` of the row's tile, see `tile_levels`; scratch for scales and zero points.
inline void stored_values(const Coded& w, int64_t r, const float* levels, float* stored, float* scratch) {
  const int64_t K = stored_of(w, r), Gs = round_up(w.G + WIDTH);
  code_values(w, r, K, stored);
  if (w.table.data) return;
  grid(w, groups_before(w, r), (K + w.group_size - 1) / w.group_size, levels, Gs, scratch, scratch + Gs);
  apply_grid(K, w.group_size, scratch, scratch + Gs, stored);
}

void coded_row(const Coded& w, int64_t r, float* row, float* scratch) {
  const int64_t Gs = round_up(w.G + WIDTH);
  float *levels = scratch + round_up(w.I), *more = levels + 4 * Gs, *stored = w.mask ? scratch : row;
  if (w.second.data) tile_levels(w, r / w.tile_rows, levels, Gs);
  stored_values(w, r, levels, stored, more);
  if (w.mask) place(w.mask + r * ((w.I + 7) / 8), w.I, stored, row);
  add_outliers(w, r, row);
}

inline float dot(const float* a, const float* b, int64_t n) {
  __m512 sum = _mm512_setzero_ps(), more = sum;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    more = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), more);
  }
  for (; i < n; i += 16) {
    const __mmask16 some = n - i >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n - i)) - 1);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, a + i), _mm512_maskz_loadu_ps(some, b + i), sum);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum, more));
}

// What outliers add.
inline float some_outliers(const Coded& w, int64_t r, const float* x) {
  if (!w.outlier_start) return 0;
  __m512 sum = _mm512_setzero_ps();
  const int64_t end = w.outlier_start[r + 1];
  for (int64_t n = w.outlier_start[r]; n < end; n += 16) {
    const __mmask16 some = end - n >= 16 ? __mmask16(0xffff) : __mmask16((1u << (end - n)) - 1);
    const __m512i column = _mm512_maskz_loadu_epi32(some, w.outlier_column + n);
    const __m512 xs = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, column, x, 4);
    sum = _mm512_fmadd_ps(xs, load_some(w.outlier_value, n, end - n), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

#include "fused_avx512.inl"
#include "turned_groups_avx512.inl"

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
  float *stored = scratch, *levels = stored + round_up(w.I), *more = levels + 4 * Gs;
  int64_t tile = -1;
  for (int64_t r = first; r < last; r++) {
    if (w.second.data && r / w.tile_rows != tile) tile_levels(w, tile = r / w.tile_rows, levels, Gs);
    stored_values(w, r, levels, stored, more);
    if (w.mask) {
      const uint8_t* mask = w.mask + r * ((w.I + 7) / 8);
      SECATEUR_BY_TOKENS((masked_dot<T>(mask, w.I, stored, in, t0, y + r, O)))
    } else {
      for (int64_t t = 0; t < in.T; t++) y[t * O + r] = dot(stored, in.x + t * in.stride, w.I);
    }
    for (int64_t t = 0; t < in.T; t++) y[t * O + r] += some_outliers(w, r, in.x + t * in.stride);
  }
}

#include "bf16_rows.inl"

void row_to_bf16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), nearest_bf16(_mm512_loadu_ps(from + i)));
}

// --- weights by input feature

#include "columns_avx512.inl"

// --- what comes between products

#include "step_math.inl"

const Kernels kernels = {"AVX-512", sparse_dot, sparse_row, coded_dot, coded_row, row_to_bf16, &trellis_vbmi, &column_kernels, &step_kernels,
                         sparse_bf16, coded_bf16_takes, coded_bf16};

}  // namespace
}  // namespace secateur

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace secateur {
const Kernels* avx512_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vbmi") ||
      !__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("fma"))
    return nullptr;
  return &kernels;
}
}  // namespace secateur

#else
namespace secateur {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace secateur
#endif
