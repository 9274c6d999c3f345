// The kernels for processors of which nothing is known.

#include "columns.h"
#include "plain.h"
#include "step.h"
#include "trellis.h"

namespace secateur {
namespace {

void sparse_row(const Sparse& w, int64_t r, float* row) {
  const uint8_t* mask = w.mask + r * ((w.I + 7) / 8);
  int64_t v = w.start[r];
  for (int64_t i = 0; i < w.I; i++) row[i] = bit_at(mask, i) ? value_at(w.values, v++) : 0.0f;
}

void sparse_dot(const Sparse& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O) {
  const int64_t B = (w.I + 7) / 8;
  for (int64_t r = first; r < last; r++) {
    for (int64_t t = 0; t < in.T; t++) y[t * O + r] = 0;
    int64_t v = w.start[r];
    for (int64_t b = 0; b < B; b++)
      for (unsigned left = w.mask[r * B + b]; left; left &= left - 1) {
        const int64_t i = 8 * b + __builtin_ctz(left);
        const float value = value_at(w.values, v++);
        for (int64_t t = 0; t < in.T; t++) y[t * O + r] += value * in.x[t * in.stride + i];
      }
  }
}

void coded_row(const Coded& w, int64_t r, float* row, float* scratch) {
  const int64_t K = stored_of(w, r);
  float* stored = w.mask ? scratch : row;
  const uint8_t* codes = w.codes + w.start[r];
  if (w.table.data) {
    for (int64_t k = 0; k < K; k++) stored[k] = value_at(w.table, (r << w.bits) + code_at(codes, w.bits, k));
  } else {
    float* scale = scratch + round_up(w.I);
    float* zero = scale + round_up(w.G + WIDTH);
    plain_grid(w, r, groups_before(w, r), (K + w.group_size - 1) / w.group_size, scale, zero);
    for (int64_t k = 0; k < K; k++) {
      const int64_t g = k / w.group_size;
      stored[k] = (float(code_at(codes, w.bits, k)) - zero[g]) * scale[g];
    }
  }
  if (w.mask) plain_place(w.mask + r * ((w.I + 7) / 8), w.I, stored, row);
  add_outliers(w, r, row);
}

void coded_dot(const Coded& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O, float* scratch) {
  float* row = scratch;
  for (int64_t r = first; r < last; r++) {
    coded_row(w, r, row, scratch + round_up(w.I));
    for (int64_t t = 0; t < in.T; t++) {
      float sum = 0;
      for (int64_t i = 0; i < w.I; i++) sum += row[i] * in.x[t * in.stride + i];
      y[t * O + r] = sum;
    }
  }
}

void row_to_bf16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
}

#include "step_math.inl"

}  // namespace

const Kernels plain_kernels = {"plain C++", sparse_dot, sparse_row, coded_dot, coded_row, row_to_bf16, &trellis_plain, &columns_plain, &step_kernels};

}  // namespace secateur
