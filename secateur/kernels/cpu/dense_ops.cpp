// Products of float32 tensors whose factors are rounded to bfloat16, where the processor has instructions for that. Sums are
// float32: what calibration text is run by.
//
// O: output features, I: input features, T: tokens.

#include "by_blocks.h"

namespace secateur {
namespace {

// Tokens of a Gram matrix that are summed at a time.
constexpr int64_t DEPTH = 512;

// x Wᵀ + bias of a weight [O, I].
Tensor rounded_linear(const Tensor& x_any, const Tensor& weight, Maybe bias) {
  STD_TORCH_CHECK(multiplying(), "secateur: this processor has no products of bfloat16");
  check_input(x_any);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const int64_t I = x.size(1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == I, "secateur: the weight is not [rows, ", I, "]");
  const int64_t O = weight.size(0);
  check(weight, ScalarType::Float, O * I, "the weight");
  const float* const w = data<float>(weight);
  const auto to_bf16 = chosen()->to_bf16;
  return by_blocks<float>(x, nullptr, bias, O, MOST_COLUMNS, [=](int64_t first, int64_t last, int64_t k0, int64_t k1, int64_t*, uint16_t* to, int64_t stride, float* padded) {
    const int64_t some = std::min(k1, I) - k0;
    for (int64_t r = first; r < last; r++, to += stride) {
      const float* row = w + r * I + k0;
      // Whole lines are read, which may end behind the last row.
      if (row + round_up(some) > w + O * I) {
        std::copy_n(row, some, padded);
        std::fill(padded + some, padded + round_up(some), 0.0f);
        row = padded;
      }
      to_bf16(row, to, some);
      std::fill(to + some, to + (k1 - k0), uint16_t(0));
    }
  });
}

// Adds xᵀx to the upper triangle of a Gram matrix [I, I], and may add anything to what is below it. I is a multiple of GROUP.
bool add_gram(const Tensor& upper, const Tensor& x_any) {
  STD_TORCH_CHECK(multiplying(), "secateur: this processor has no products of bfloat16");
  check_input(x_any);
  const Products& products = *multiplying();
  const int64_t T = x_any.size(0), I = x_any.size(1);
  STD_TORCH_CHECK(I % GROUP == 0 && upper.dim() == 2 && upper.size(0) == I && upper.size(1) == I, "secateur: the Gram matrix is not [", I, ", ", I, "], of whole groups of ", GROUP);
  check(upper, ScalarType::Float, I * I, "the Gram matrix");
  Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  float* const sums = static_cast<float*>(upper.data_ptr());
  const int64_t groups = I / GROUP, most = std::min(DEPTH, up_to(T, STEP));
  Lines<uint16_t> laid(I * most);
  for (int64_t t = 0; t < T; t += DEPTH) {
    const int64_t tokens = std::min(DEPTH, T - t), depth = up_to(tokens, STEP);
    const Tensor rounded = as_dtype(narrow(x, 0, t, tokens), ScalarType::BFloat16);
    const uint16_t* const from = static_cast<const uint16_t*>(rounded.data_ptr());
    torch::stable::parallel_for(0, groups, std::max<int64_t>(1, WEIGHTS_PER_THREAD / (GROUP * depth)), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++)
        products.lay_columns(from + g * GROUP, tokens, I, depth, laid.data() + g * GROUP * depth);
    });
    // Rows from above and from below in turn, so that every thread has as much of the triangle.
    const int64_t pieces = up_to(I, ROWS_AT_ONCE) / ROWS_AT_ONCE;
    torch::stable::parallel_for(0, pieces, std::max<int64_t>(1, PRODUCTS_PER_THREAD / (ROWS_AT_ONCE * I * depth)), [&](int64_t begin, int64_t end) {
      Lines<uint16_t> rows(ROWS_AT_ONCE * ROW_STRIDE);
      for (int64_t number = begin; number < end; number++) {
        const int64_t piece = number % 2 ? pieces - 1 - number / 2 : number / 2, first = piece * ROWS_AT_ONCE, count = std::min(ROWS_AT_ONCE, I - first);
        for (int64_t r = 0; r < count; r += GROUP)
          products.columns_as_rows(laid.data() + (first + r) * depth, depth, rows.data() + r * ROW_STRIDE);
        products.multiply({rows.data(), count, laid.data() + first * depth, GROUP * depth, groups - first / GROUP, depth, sums + first * I + first, I, true});
      }
    });
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def("rounded_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("add_gram(Tensor(a!) upper, Tensor x) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("rounded_linear", TORCH_BOX(&rounded_linear));
  m.impl("add_gram", TORCH_BOX(&add_gram));
}

}  // namespace secateur
