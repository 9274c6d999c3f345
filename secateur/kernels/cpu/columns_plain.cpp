// The kernels for weights by input feature on processors of which nothing is known.

#include "columns.h"
#include "plain.h"

namespace secateur {
namespace {

void add_values(const Columns& w, const KeptInputs& in, int64_t k, int64_t first, int64_t last, float* y, int64_t stride) {
  const int64_t i = in.number[k];
  const float* x = in.x + k * in.T;
  const uint8_t* mask = w.mask ? w.mask + i * ((w.O + 7) / 8) : nullptr;
  int64_t v = mask ? values_before(w, i, first) : i * w.O + first;
  for (int64_t o = first; o < last; o++) {
    if (mask && !bit_at(mask, o)) continue;
    const float value = value_at(w.values, v++);
    for (int64_t t = 0; t < in.T; t++) y[t * stride + o] += value * x[t];
  }
}

void add_codes(const Columns& w, const KeptInputs& in, int64_t k, int64_t first, int64_t last, float* y, int64_t stride) {
  const int64_t i = in.number[k], group = i / w.group_size * w.O;
  const float* x = in.x + k * in.T;
  const uint8_t* codes = w.codes + i * ((w.O * w.bits + 7) / 8);
  for (int64_t o = first; o < last; o++) {
    const float zero = w.zero ? w.zero[group + o] : float(1 << (w.bits - 1));
    const float value = (float(code_at(codes, w.bits, o)) - zero) * value_at(w.scale, group + o);
    for (int64_t t = 0; t < in.T; t++) y[t * stride + o] += value * x[t];
  }
}

void dot(const Columns& w, const KeptInputs& in, int64_t first, int64_t last, float* y, int64_t stride, float*) {
  for (int64_t t = 0; t < in.T; t++) std::memset(y + t * stride + first, 0, round_up(last - first) * sizeof(float));
  for (int64_t k = 0; k < in.K; k++) (w.codes ? add_codes : add_values)(w, in, k, first, last, y, stride);
}

}  // namespace

const ColumnKernels columns_plain = {dot};

}  // namespace secateur
