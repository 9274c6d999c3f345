// How many tokens are multiplied: rows are unpacked to bfloat16, a block of them and of their columns at a time, once for all of
// some hundred tokens, and multiplied while they lie in the cache.
//
// O: output features, I: input features, T: tokens.

#pragma once

#include <memory>

#include "operators.h"
#include "products.h"

namespace secateur {

// The products that are in use; null where torch multiplies.
const Products* multiplying();

namespace {

// Groups of tokens that rows are unpacked once for, and what inputs and sums of a block may take: half the second-level cache.
constexpr int64_t GROUPS_AT_ONCE = 32, INPUT_BYTES = 1 << 19, SUM_BYTES = 1 << 19;
constexpr int64_t LEAST_COLUMNS = 512;
// A thread is not woken for fewer products of a weight and an input.
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 20;

inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory that nothing is in yet, from the start of a line of the cache on.
template <class T>
class Lines {
 public:
  explicit Lines(int64_t n) : memory_(new uint8_t[n * sizeof(T) + 64]) {}
  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t(63)); }

 private:
  std::unique_ptr<uint8_t[]> memory_;
};

// What a thread does for the rows from `first` to before `last` and some groups of tokens.
template <class Out>
struct Share {
  int64_t first, last, I, depth, groups, tokens;
  const uint16_t* x;  // as `Block` has it, all columns
  const float* bias;  // of all rows, or null
  Out* out;           // [tokens, O]
  int64_t O;
};

// `unpack(first, last, k0, k1, at, to, stride, scratch)` gives columns of rows as bfloat16; `at` is a number of each row, which
// it may keep from the columns before.
template <class Out, class Unpack>
void do_share(const Share<Out>& s, const Products& products, int64_t scratch, const Unpack& unpack) {
  // Rows of sums begin in different lines of the first-level cache.
  const int64_t padded = s.groups * GROUP + GROUP;
  const int64_t columns = std::min(s.depth, std::clamp(INPUT_BYTES / (2 * GROUP * s.groups), LEAST_COLUMNS, MOST_COLUMNS) / 64 * 64);
  const int64_t rows = std::min(up_to(s.last - s.first, GROUP), std::max(ROWS_AT_ONCE, SUM_BYTES / (4 * padded) / ROWS_AT_ONCE * ROWS_AT_ONCE));
  Lines<uint16_t> weights(ROWS_AT_ONCE * ROW_STRIDE);
  Lines<float> sums(rows * padded), spare(scratch);
  std::unique_ptr<int64_t[]> at(new int64_t[rows]);
  for (int64_t top = s.first; top < s.last; top += rows) {
    const int64_t bottom = std::min(top + rows, s.last);
    for (int64_t k0 = 0; k0 < s.depth; k0 += columns) {
      const int64_t k1 = std::min(k0 + columns, s.depth);
      for (int64_t r = top; r < bottom; r += ROWS_AT_ONCE) {
        const int64_t count = std::min(ROWS_AT_ONCE, bottom - r), whole = up_to(count, GROUP);
        unpack(r, r + count, k0, k1, at.get() + r - top, weights.data(), ROW_STRIDE, spare.data());
        // Rows that are not there have sums, too, which nobody reads; they are not to be slow.
        for (int64_t j = count; j < whole; j++) std::fill_n(weights.data() + j * ROW_STRIDE, k1 - k0, uint16_t(0));
        products.multiply({weights.data(), whole, s.x + k0 * GROUP, s.depth * GROUP, s.groups, k1 - k0,
                           sums.data() + (r - top) * padded, padded, k0 > 0});
      }
    }
    const float* const added = s.bias ? s.bias + top : nullptr;
    if constexpr (std::is_same_v<Out, float>)
      products.finish_floats(sums.data(), padded, bottom - top, s.tokens, added, s.out + top, s.O);
    else
      products.finish(sums.data(), padded, bottom - top, s.tokens, added, s.out + top, s.O);
  }
}

// x Wᵀ + bias for inputs that are rounded to bfloat16: as bfloat16, or as float32 sums.
template <class Out = uint16_t, class Unpack>
Tensor by_blocks(const Tensor& x, const int32_t* order, Maybe bias, int64_t O, int64_t scratch, const Unpack& unpack) {
  const Products& products = *multiplying();
  const int64_t T = x.size(0), I = x.size(1), depth = up_to(I, STEP), groups = up_to(T, GROUP) / GROUP;
  std::unique_ptr<float[]> added;
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->numel() == O, "secateur: the bias is not [", O, "]");
    const Tensor whole = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    added.reset(new float[O]);
    with_values(whole, [&](const auto* values) { std::transform(values, values + O, added.get(), [](auto v) { return float(v); }); });
  }
  Tensor y = empty(T, O, std::is_same_v<Out, float> ? ScalarType::Float : ScalarType::BFloat16);
  Out* const out = static_cast<Out*>(y.data_ptr());
  const int64_t pieces = up_to(O, ROWS_AT_ONCE) / ROWS_AT_ONCE;
  Lines<uint16_t> laid(std::min(GROUPS_AT_ONCE, groups) * GROUP * depth);
  Tensor inputs = x;
  for (int64_t first = 0; first < groups; first += GROUPS_AT_ONCE) {
    const int64_t some = std::min(GROUPS_AT_ONCE, groups - first), t = first * GROUP, tokens = std::min(some * GROUP, T - t);
    const Tensor source = in_order(narrow(inputs, 0, t, tokens), order, ScalarType::BFloat16);
    const uint16_t* const from = static_cast<const uint16_t*>(source.data_ptr());
    torch::stable::parallel_for(0, some, std::max<int64_t>(1, WEIGHTS_PER_THREAD / (GROUP * depth)), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++)
        products.lay(from + g * GROUP * I, std::min(GROUP, tokens - g * GROUP), I, depth, laid.data() + g * GROUP * depth);
    });
    const int64_t least = std::max<int64_t>(1, PRODUCTS_PER_THREAD / (ROWS_AT_ONCE * depth * tokens));
    torch::stable::parallel_for(0, pieces, least, [&](int64_t begin, int64_t end) {
      do_share<Out>({begin * ROWS_AT_ONCE, std::min(end * ROWS_AT_ONCE, O), I, depth, some, tokens, laid.data(), added.get(), out + t * O, O},
                    products, scratch, unpack);
    });
  }
  return y;
}

}  // namespace
}  // namespace secateur
