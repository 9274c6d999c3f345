// The kernels for trellis codes on processors of which nothing is known.

#include "trellis_plain.h"

namespace secateur {
namespace {

void rotate_in(Floats x, int64_t at, Floats scale, int64_t n, int64_t block, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = value_at(x, at + i) * value_at(scale, i);
  plain_hadamard(to, n, block);
}

void rotate_out(float* row, Floats scale, float factor, int64_t n, int64_t block) {
  plain_hadamard(row, n, block);
  for (int64_t i = 0; i < n; i++) row[i] *= value_at(scale, i) * factor;
}

}  // namespace

const TrellisKernels trellis_plain = {plain_trellis_dot, plain_trellis_expand, rotate_in, rotate_out};

}  // namespace secateur
