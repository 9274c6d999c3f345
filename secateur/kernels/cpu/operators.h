// What operators have in common: the tensors that they are given, checked.
//
// Nothing but torch's stable ABI is used: what is compiled once works with every torch from TORCH_TARGET_VERSION on, in every Python.
//
// I: input features.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "rows.h"

namespace secateur {

// The kernels that are in use.
const Kernels* chosen();

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = const std::optional<Tensor>&;

// From so many tokens on, rows are unpacked, a tile of them at a time, and multiplied by torch.
constexpr int64_t FROM_TOKENS = 9;
// A tile of unpacked rows stays in the second-level cache, but with fewer rows torch's products are slow.
constexpr int64_t TILE_BYTES = 1 << 20, LEAST_ROWS = 128;
// A thread is not woken for less: to wake one takes about as long.
constexpr int64_t WEIGHTS_PER_THREAD = 1 << 17;

inline Float float_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    default:
      STD_TORCH_CHECK(false, "secateur: values are float32, bfloat16 or float16, not ", torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check(const Tensor& t, ScalarType dtype, int64_t at_least, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() >= at_least, "secateur: ", name,
                  " is not a contiguous ", torch::headeronly::toString(dtype), " of at least ", at_least,
                  " elements in the CPU's memory");
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

inline Tensor empty(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns};
  return torch::stable::empty({sizes, 2}, dtype);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

// Calls `body` with the values of a tensor of any dtype that there is here.
template <class Body>
void with_values(const Tensor& t, const Body& body) {
  switch (float_of(t)) {
    case Float::f32:
      return body(data<float>(t));
    case Float::bf16:
      return body(data<torch::headeronly::BFloat16>(t));
    case Float::f16:
      return body(data<torch::headeronly::Half>(t));
  }
}

inline Floats floats_of(const Tensor& t, int64_t at_least, const char* name) {
  check(t, t.scalar_type(), at_least, name);
  // Null is for what a weight does not have; it may have a scale for each of no groups.
  static const float none = 0;
  return {t.numel() ? t.data_ptr() : &none, float_of(t)};
}

inline void check_input(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "secateur: the CPU kernels take inputs in the CPU's memory, not on another device");
  STD_TORCH_CHECK(x.dim() == 2, "secateur: the input is [tokens, features]");
  float_of(x);
}

// Eight sums, so that the compiler can add up side by side.
inline float sum_of(const float* x, int64_t i, int64_t end) {
  float total[8] = {};
  for (; i + 8 <= end; i += 8)
    for (int j = 0; j < 8; j++) total[j] += x[i + j];
  for (; i < end; i++) total[0] += x[i];
  for (int j = 1; j < 8; j++) total[0] += total[j];
  return total[0];
}

// The inputs with columns in stored order, in a dtype in which torch multiplies fast.
inline Tensor in_order(const Tensor& x, const int32_t* order, ScalarType dtype) {
  if (!order) return as_dtype(x, dtype);
  const int64_t T = x.size(0), I = x.size(1);
  Tensor found = empty(T, I, dtype);
  with_values(x, [&](const auto* values) {
    using X = std::decay_t<decltype(*values)>;
    using To = std::conditional_t<std::is_same_v<X, torch::headeronly::Half>, float, X>;
    To* const to = static_cast<To*>(found.data_ptr());
    torch::stable::parallel_for(0, T, std::max<int64_t>(1, WEIGHTS_PER_THREAD / std::max<int64_t>(I, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t i = 0; i < I; i++) to[t * I + i] = To(values[t * I + order[i]]);
    });
  });
  return found;
}

inline int64_t grain(int64_t I) { return std::max<int64_t>(1, WEIGHTS_PER_THREAD / std::max<int64_t>(I, 1)); }

}  // namespace
}  // namespace secateur
