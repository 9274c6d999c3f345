// Plain C++ on single values: what the vector kernels do to the ends of rows and in rare cases, and all that other
// processors have.

#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"

namespace secateur {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float value = float(fraction) * 0x1p-24f;  // subnormal
  return sign ? -value : value;
}

inline float value_at(Floats v, int64_t i) {
  switch (v.dtype) {
    case Float::f32:
      return static_cast<const float*>(v.data)[i];
    case Float::bf16:
      return from_bits(uint32_t(static_cast<const uint16_t*>(v.data)[i]) << 16);
    default:
      return from_f16(static_cast<const uint16_t*>(v.data)[i]);
  }
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // NaN stays NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline bool bit_at(const uint8_t* mask, int64_t i) { return mask[i >> 3] >> (i & 7) & 1; }

// Eight bytes of a mask of B bytes from byte b on, as far as there are any.
inline uint64_t mask_word(const uint8_t* mask, int64_t b, int64_t B) {
  uint64_t word = 0;
  if (b + 8 <= B)
    std::memcpy(&word, mask + b, 8);
  else
    std::memcpy(&word, mask + b, B - b);
  return word;
}

inline int code_at(const uint8_t* codes, int bits, int64_t k) {
  const int64_t bit = k * bits;
  // Two bytes always hold a code of up to eight bits; after the last there are more bytes to read.
  const int word = codes[bit >> 3] | codes[(bit >> 3) + 1] << 8;
  return word >> (bit & 7) & ((1 << bits) - 1);
}

// Scales and zero points of row r's groups, `n` of them.
inline void plain_grid(const Coded& w, int64_t r, int64_t first_group, int64_t n, float* scale, float* zero) {
  if (w.scale.data) {
    for (int64_t g = 0; g < n; g++) {
      scale[g] = value_at(w.scale, first_group + g);
      zero[g] = w.zero ? w.zero[first_group + g] : w.level.data ? value_at(w.level, first_group + g) : float(1 << (w.bits - 1));
    }
    return;
  }
  const int64_t tile = r / w.tile_rows * w.second_groups;
  for (int64_t g = 0; g < n; g++) {
    const int64_t at = first_group + g;
    const int c = w.nibbles ? w.pair[at] & 15 : w.pair[2 * at], d = w.nibbles ? w.pair[at] >> 4 : w.pair[2 * at + 1];
    const int64_t level = 4 * (tile + g);
    scale[g] = value_at(w.second, level + 1) + value_at(w.second, level) * c;
    zero[g] = value_at(w.second, level + 3) + value_at(w.second, level + 2) * d;
  }
}

inline int64_t stored_of(const Coded& w, int64_t r) { return w.count ? w.count[r] : w.I; }
inline int64_t groups_before(const Coded& w, int64_t r) { return w.group_start ? w.group_start[r] : r * w.G; }

// What a fused kernel keeps for each of the rows that it does side by side.
struct Stream {
  float *scale, *zero, *levels, *repeated;
  int64_t tile = -1;  // of which `levels` are

  // Takes its memory from `scratch`; returns the rest.
  float* lay_out(const Coded& w, int64_t blocks, float* scratch) {
    const int64_t Gs = round_up(w.G + WIDTH);
    scale = scratch;
    zero = scale + Gs;
    levels = zero + Gs;
    repeated = levels + 4 * Gs;
    // A table's values need no scale.
    if (w.table.data)
      for (int64_t b = 0; b < blocks; b++) repeated[b] = 1;
    return repeated + blocks;
  }
};

// What the outliers of row r add to the output for inputs x, columns in stored order.
inline float outliers_dot(const Coded& w, int64_t r, const float* x) {
  if (!w.outlier_start) return 0;
  float sum = 0;
  for (int64_t n = w.outlier_start[r]; n < w.outlier_start[r + 1]; n++)
    sum += value_at(w.outlier_value, n) * x[w.outlier_column[n]];
  return sum;
}

inline void add_outliers(const Coded& w, int64_t r, float* row) {
  if (!w.outlier_start) return;
  for (int64_t n = w.outlier_start[r]; n < w.outlier_start[r + 1]; n++)
    row[w.outlier_column[n]] += value_at(w.outlier_value, n);
}

// Moves the K values of `stored` to the columns that the mask has, with zeros between.
inline void plain_place(const uint8_t* mask, int64_t I, const float* stored, float* row) {
  for (int64_t i = 0, k = 0; i < I; i++) row[i] = bit_at(mask, i) ? stored[k++] : 0.0f;
}

}  // namespace
}  // namespace secateur

// Tokens in fours, twos and ones.
#define SECATEUR_BY_TOKENS(call)                  \
  for (int64_t t0 = 0, left = in.T; left;) {      \
    const int64_t n = left >= 4 ? 4 : left >= 2 ? 2 : 1; \
    if (n == 4) { constexpr int T = 4; call; }    \
    else if (n == 2) { constexpr int T = 2; call; } \
    else { constexpr int T = 1; call; }           \
    t0 += n;                                      \
    left -= n;                                    \
  }
