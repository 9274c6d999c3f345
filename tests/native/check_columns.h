// The kernels for weights by input feature against the plain ones, see check_kernels.cpp.

#pragma once

#include "columns.h"
#include "random_memory.h"

namespace {

// Values, all of them or under a mask, or codes; returns the largest of the terms that make a weight.
float random_columns_of(Memory& memory, Columns& w) {
  if (chance(0.4)) {
    w.bits = int(2 + below(7));
    w.group_size = std::min<int64_t>(w.I, one_of<int64_t>({1, 3, 8, 16, 64, 1000}));
    const int64_t groups = (w.I + w.group_size - 1) / w.group_size * w.O;
    w.codes = memory.exactly(random_bytes(w.I * ((w.O * w.bits + 7) / 8)), padding);
    w.scale = memory.values(groups, one_of<Float>({Float::bf16, Float::f16}), false, padding);
    if (chance(0.5)) w.zero = memory.exactly(random_bytes(groups), padding);
    return 8 * 1024;
  }
  const Float dtype = one_of<Float>({Float::f32, Float::bf16, Float::f16});
  int64_t stored = w.I * w.O;
  if (chance(0.5)) {
    std::vector<int64_t> count;
    const std::vector<uint8_t> mask = random_mask(w.I, w.O, count);
    std::vector<int32_t> before;
    for (int64_t i = 0; i < w.I; i++)
      for (int64_t o = 0, found = 0; o < w.O; o++) {
        if (o % CHUNK == 0) before.push_back(int32_t(found));
        found += bit_at(mask.data() + i * ((w.O + 7) / 8), o);
      }
    w.mask = memory.exactly(mask);
    w.start = memory.exactly(running_sum<int64_t>(count));
    w.before = memory.exactly(before);
    stored = w.start[w.I];
  }
  w.values = memory.values(stored, dtype, true, padding);
  return 8;
}

void check_columns(const std::vector<const Kernels*>& all, int64_t number) {
  Memory memory;
  Columns w = {};
  w.I = one_of<int64_t>({1, 2, 7, 9, 16, 17, 40});
  w.O = one_of<int64_t>({1, 7, 8, 31, 33, 63, 64, 65, 200, 256, 257, 520});
  const float largest = random_columns_of(memory, w);
  const int64_t T = 1 + below(8), first = WIDTH * below((w.O + WIDTH - 1) / WIDTH);
  const int64_t last = std::min(w.O, round_up(first + 1 + below(w.O - first))), stride = round_up(w.O);
  std::vector<int32_t> kept;
  const double share = one_of<double>({0, 0.3, 0.7, 1});
  for (int64_t i = 0; i < w.I; i++)
    if (chance(share)) kept.push_back(int32_t(i));
  const int64_t K = int64_t(kept.size());
  const float* x = static_cast<const float*>(memory.values(K * T, Float::f32, true).data);
  const KeptInputs in = {T, K, memory.exactly(kept), x};
  const int64_t scratch = T * round_up(last - first);
  float* want = memory.floats(T * stride);
  columns_plain.dot(w, in, first, last, want, stride, memory.floats(scratch));
  for (const Kernels* kernels : all) {
    float* y = memory.floats(T * stride);
    kernels->columns->dot(w, in, first, last, y, stride, memory.floats(scratch));
    for (int64_t t = 0; t < T; t++) {
      float size = 0;
      for (int64_t k = 0; k < K; k++) size += std::fabs(x[k * T + t]);
      for (int64_t o = 0; o < stride; o++) {
        const bool asked = o >= first && o < last, beyond = o >= last && o < round_up(last);
        if (asked ? !(std::fabs(y[t * stride + o] - want[t * stride + o]) <= 1e-5f * size * largest)
                  : !beyond && y[t * stride + o] != 0)
          fail("columns", *kernels, number);
      }
    }
  }
}

}  // namespace
