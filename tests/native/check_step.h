// What comes between products in a decoder layer, against the plain kernels, on memory that is exactly as long as step.h promises.

#pragma once

#include "random_memory.h"
#include "step.h"

namespace secateur {
namespace {

inline void near(const float* y, const float* want, int64_t n, float tolerance, const char* what, const Kernels& kernels, int64_t number) {
  for (int64_t i = 0; i < n; i++)
    if (!(std::fabs(y[i] - want[i]) <= tolerance * (1 + std::fabs(want[i])))) fail(what, kernels, number);
}

inline void check_dense(const std::vector<const Kernels*>& all, int64_t number) {
  Memory memory;
  const int64_t O = 1 + below(9), I = one_of<int64_t>({1, 7, 15, 16, 17, 64, 65, 200}), T = below(9), first = below(O), last = first + 1 + below(O - first);
  const Dense w = {I, memory.values(O * I, one_of<Float>({Float::f32, Float::bf16, Float::f16}), true)};
  const Inputs in = random_inputs(memory, T, I, 1, 0, false);
  float* want = memory.floats(T * O);
  plain_kernels.step->dense_dot(w, in, first, last, want, O);
  for (const Kernels* kernels : all) {
    float* y = memory.floats(T * O);
    kernels->step->dense_dot(w, in, first, last, y, O);
    near(y, want, T * O, 1e-5f * 8 * float(I), "dense", *kernels, number);
  }
}

inline void check_attention(const std::vector<const Kernels*>& all, int64_t number) {
  Memory memory;
  const int64_t D = one_of<int64_t>({2, 8, 16, 18, 64, 80, 128}), S = one_of<int64_t>({1, 3, 4, 15, 16, 17, 63, 64, 65, 100});
  const Float dtype = one_of<Float>({Float::f32, Float::bf16, Float::f16});
  std::vector<uint8_t> seen(S);
  const double share = one_of<double>({0, 0.3, 1});
  for (uint8_t& each : seen) each = chance(share);
  const Floats query = memory.values(D, Float::f32, true);
  const Head head = {D, S, static_cast<const float*>(query.data), memory.values(S * D, dtype, true), memory.values(S * D, dtype, true),
                     chance(0.5) ? memory.exactly(seen) : nullptr};
  float* want = memory.floats(D);
  plain_kernels.step->attend(head, memory.floats(round_up(S)), want);
  for (const Kernels* kernels : all) {
    float* y = memory.floats(D);
    kernels->step->attend(head, memory.floats(round_up(S)), y);
    near(y, want, D, 1e-2f, "attention", *kernels, number);
  }
}

inline void check_between(const std::vector<const Kernels*>& all, int64_t number) {
  Memory memory;
  const int64_t n = 2 * (1 + below(100)), size = 1 + below(n), G = (n + size - 1) / size, stride = round_up(n);
  const Floats weight = memory.values(n, one_of<Float>({Float::f32, Float::bf16, Float::f16}), true);
  const float *a = static_cast<const float*>(memory.values(n, Float::f32, true).data), *b = static_cast<const float*>(memory.values(n, Float::f32, true).data);
  const float* wide = static_cast<const float*>(memory.values(stride, Float::f32, true).data);
  std::vector<std::vector<float>> want;
  for (const Kernels* kernels : all) {
    float *normed = memory.floats(n), *gated = memory.floats(n), *sums = memory.floats(round_up(G)), *split = memory.floats(stride);
    float* turned = memory.exactly(std::vector<float>(wide, wide + n));
    kernels->step->rms_norm(a, weight, n, 1e-5f, normed);
    kernels->step->gated(a, b, n, gated);
    kernels->step->group_sums(a, n, size, G, sums);
    kernels->step->split(wide, stride, split);
    kernels->step->turn(turned, a, b, n);
    const std::vector<std::vector<float>> found = {{normed, normed + n}, {gated, gated + n}, {sums, sums + round_up(G)}, {split, split + stride}, {turned, turned + n}};
    if (want.empty()) want = found;
    for (size_t i = 0; i < found.size(); i++) near(found[i].data(), want[i].data(), int64_t(want[i].size()), 1e-4f * 64, "between products", *kernels, number);
  }
}

inline void check_step(const std::vector<const Kernels*>& all, int64_t number) {
  check_dense(all, number);
  check_attention(all, number);
  check_between(all, number);
}

}  // namespace
}  // namespace secateur
