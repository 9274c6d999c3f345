// The operators: what is checked, how inputs are laid out, how rows are dealt out to threads.
//
// O: output features, I: input features, T: tokens, G: groups of a row.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "rows.h"

namespace secateur {
namespace {

using at::Tensor;
using Maybe = const std::optional<Tensor>&;

// From so many tokens on, rows are unpacked, a tile of them at a time, and multiplied by torch.
constexpr int64_t FROM_TOKENS = 9;
// A tile of unpacked rows stays in the second-level cache, but with fewer rows torch's products are slow.
constexpr int64_t TILE_BYTES = 1 << 20, LEAST_ROWS = 128;
// A thread is not woken for less: to wake one takes about as long.
constexpr int64_t WEIGHTS_PER_THREAD = 1 << 17;

const Kernels*& chosen() {
  static const Kernels* kernels = avx512_kernels() ? avx512_kernels() : avx2_kernels() ? avx2_kernels() : &plain_kernels;
  return kernels;
}

// "avx512", "avx2" or "plain"; what is there when this processor cannot run them is left unchanged, and false is returned.
bool use(const std::string& name) {
  const Kernels* kernels = name == "avx512" ? avx512_kernels() : name == "avx2" ? avx2_kernels() : name == "plain" ? &plain_kernels : nullptr;
  if (kernels) chosen() = kernels;
  return kernels != nullptr;
}

std::string using_now() { return chosen()->name; }

Float float_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Float::f32;
    case at::kBFloat16:
      return Float::bf16;
    case at::kHalf:
      return Float::f16;
    default:
      TORCH_CHECK(false, "secateur: values are float32, bfloat16 or float16, not ", t.scalar_type());
  }
}

void check(const Tensor& t, at::ScalarType dtype, int64_t at_least, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() >= at_least, "secateur: ", name,
              " is not a contiguous ", dtype, " of at least ", at_least, " elements in the CPU's memory");
}

Floats floats_of(const Tensor& t, int64_t at_least, const char* name) {
  check(t, t.scalar_type(), at_least, name);
  // Null is for what a weight does not have; it may have a scale for each of no groups.
  static const float none = 0;
  return {t.numel() ? t.data_ptr() : &none, float_of(t)};
}

template <class T>
const T* optional_data(Maybe t, at::ScalarType dtype, int64_t at_least, const char* name) {
  if (!t) return nullptr;
  check(*t, dtype, at_least, name);
  return t->const_data_ptr<T>();
}

// The inputs as kernels want them, and the memory that they lie in: one piece, since a token has little time to wait for more.
struct Laid {
  Tensor memory;
  Inputs in;
};

template <class X>
void lay_row(const X* x, const int32_t* order, int64_t I, float* to) {
  if (order)
    for (int64_t i = 0; i < I; i++) to[i] = float(x[order[i]]);
  else
    at::vec::convert(x, to, I);
}

Laid lay_out(const Tensor& x, int64_t group_size, int64_t G, bool split, const int32_t* order) {
  const int64_t T = x.size(0), I = x.size(1), stride = round_up(I), sums = round_up(G);
  const int64_t floats = stride * (split ? 2 : 1) + sums;
  Laid laid{at::empty({T, floats}, at::kFloat), {}};
  float* const rows = laid.memory.data_ptr<float>();
  float* const splits = rows + T * stride;
  float* const group_sums = rows + T * (floats - sums);
  for (int64_t t = 0; t < T; t++) {
    float* to = rows + t * stride;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "secateur", [&] {
      lay_row(x.const_data_ptr<scalar_t>() + t * I, order, I, to);
    });
    std::fill(to + I, to + stride, 0.0f);
    if (split)
      for (int64_t i = 0; i < stride; i++) splits[t * stride + (i & ~31) + (i & 1) * 16 + (i % 32) / 2] = to[i];
    for (int64_t g = 0; g < sums; g++) {
      // Eight sums, so that the compiler can add up side by side.
      float total[8] = {};
      const int64_t end = std::min((g + 1) * group_size, I);
      int64_t i = std::min(g * group_size, I);
      for (; i + 8 <= end; i += 8)
        for (int j = 0; j < 8; j++) total[j] += to[i + j];
      for (; i < end; i++) total[0] += to[i];
      for (int j = 1; j < 8; j++) total[0] += total[j];
      group_sums[t * sums + g] = total[0];
    }
  }
  laid.in = {T, stride, rows, split ? splits : nullptr, G ? group_sums : nullptr, sums};
  return laid;
}

// Sums and bias in the dtype of the inputs.
Tensor finish(Tensor y, Maybe bias, at::ScalarType dtype) {
  if (bias) y.add_(*bias);
  return y.scalar_type() == dtype ? y : y.to(dtype);
}

int64_t grain(int64_t I) { return std::max<int64_t>(1, WEIGHTS_PER_THREAD / std::max<int64_t>(I, 1)); }

// x Wᵀ by unpacking tiles of rows; `row(r, w, scratch)` unpacks one in float32, columns in stored order.
template <class Row>
Tensor by_tiles(const Tensor& x, Maybe order, Maybe bias, int64_t O, int64_t floats, const Row& row) {
  const int64_t T = x.size(0), I = x.size(1), stride = round_up(I);
  // float16 products are slow in torch on a CPU.
  const auto dtype = x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
  const Tensor source = (order ? x.index_select(1, *order) : x).to(dtype);
  Tensor y = at::empty({T, O}, source.options());
  const int64_t rows = std::clamp<int64_t>(TILE_BYTES / (stride * at::elementSize(dtype)), LEAST_ROWS, 8 * LEAST_ROWS);
  Tensor tile = at::empty({std::min(rows, O), stride}, source.options());
  const Kernels& kernels = *chosen();
  for (int64_t first = 0; first < O; first += rows) {
    const int64_t count = std::min(rows, O - first);
    at::parallel_for(0, count, grain(I), [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(stride + floats);
      for (int64_t r = begin; r < end; r++) {
        if (dtype == at::kFloat) {
          row(first + r, tile.data_ptr<float>() + r * stride, buffer.data());
        } else {
          row(first + r, buffer.data(), buffer.data() + stride);
          kernels.to_bf16(buffer.data(), static_cast<uint16_t*>(tile.data_ptr()) + r * stride, I);
        }
      }
    });
    Tensor part = y.narrow(1, first, count);
    const Tensor weight = tile.narrow(0, 0, count).narrow(1, 0, I).t();
    if (bias)
      at::addmm_out(part, bias->narrow(0, first, count).to(dtype), source, weight);
    else
      at::mm_out(part, source, weight);
  }
  return y.to(x.scalar_type());
}

void check_input(const Tensor& x) {
  TORCH_CHECK(x.device().is_cpu(), "secateur: the CPU kernels take inputs in the CPU's memory, not on ", x.device());
  TORCH_CHECK(x.dim() == 2, "secateur: the input is [tokens, features]");
  float_of(x);
}

Tensor sparse_linear(const Tensor& x_any, const Tensor& values, const Tensor& mask, const Tensor& start, Maybe bias) {
  check_input(x_any);
  const Tensor x = x_any.contiguous();
  const int64_t T = x.size(0), I = x.size(1), O = start.numel() - 1;
  Sparse w;
  w.I = I;
  check(start, at::kLong, 1, "start");
  w.start = start.const_data_ptr<int64_t>();
  check(mask, at::kByte, O * ((I + 7) / 8), "the bit mask");
  w.mask = mask.const_data_ptr<uint8_t>();
  w.values = floats_of(values, w.start[O] + WIDTH / values.element_size(), "values");
  const Kernels& kernels = *chosen();
  if (T >= FROM_TOKENS) {
    return by_tiles(x, std::nullopt, bias, O, 0, [&](int64_t r, float* row, float*) { kernels.sparse_row(w, r, row); });
  }
  const Laid laid = lay_out(x, 0, 0, w.values.dtype == Float::bf16, nullptr);
  Tensor y = at::empty({T, O}, at::kFloat);
  float* out = y.data_ptr<float>();
  at::parallel_for(0, O, grain(I), [&](int64_t first, int64_t last) { kernels.sparse_dot(w, laid.in, first, last, out, O); });
  return finish(std::move(y), bias, x.scalar_type());
}

Tensor coded_linear(const Tensor& x_any, int64_t bits, const Tensor& codes, const Tensor& start, Maybe count, Maybe group_start,
                    int64_t group_size, Maybe scale, Maybe zero, Maybe pair, Maybe second, int64_t tile_rows, Maybe table,
                    Maybe mask, Maybe order, Maybe outlier_start, Maybe outlier_column, Maybe outlier_value, Maybe bias) {
  check_input(x_any);
  const Tensor x = x_any.contiguous();
  const int64_t T = x.size(0), I = x.size(1), O = start.numel() - 1;
  TORCH_CHECK(bits >= 1 && bits <= 8, "secateur: codes have 1 to 8 bits, not ", bits);
  TORCH_CHECK(int(scale.has_value()) + int(pair.has_value() && second.has_value()) + int(table.has_value()) == 1,
              "secateur: codes have one grid");
  TORCH_CHECK(mask.has_value() == count.has_value(), "secateur: a mask comes with the counts of its rows");
  check(start, at::kLong, 1, "start");
  Coded w = {};
  w.I = I;
  w.bits = int(bits);
  w.start = start.const_data_ptr<int64_t>();
  check(codes, at::kByte, w.start[O] + WIDTH, "codes");
  w.codes = codes.const_data_ptr<uint8_t>();
  w.count = optional_data<int32_t>(count, at::kInt, O, "count");
  w.group_start = optional_data<int64_t>(group_start, at::kLong, O + 1, "group_start");
  if (table) {
    w.table = floats_of(*table, O << bits, "table");
  } else {
    TORCH_CHECK(group_size >= 1, "secateur: groups of ", group_size);
    w.group_size = std::max<int64_t>(1, std::min(group_size, I));
    w.G = (I + w.group_size - 1) / w.group_size;
    const int64_t groups = w.group_start ? w.group_start[O] : O * w.G;
    if (scale) {
      w.scale = floats_of(*scale, groups, "scale");
      w.zero = optional_data<uint8_t>(zero, at::kByte, groups, "zero");
    } else {
      TORCH_CHECK(tile_rows >= 1, "secateur: tiles of ", tile_rows, " rows");
      w.tile_rows = tile_rows;
      w.nibbles = pair->dim() == 1;
      check(*pair, at::kByte, w.nibbles ? groups : 2 * groups, "pair");
      w.pair = pair->const_data_ptr<uint8_t>();
      const int64_t tiles = (O + tile_rows - 1) / tile_rows;
      TORCH_CHECK(second->dim() == 3 && second->size(0) == tiles && second->size(2) == 4, "secateur: second is not [tiles, groups, 4]");
      w.second_groups = second->size(1);
      TORCH_CHECK(w.second_groups <= w.G && (w.group_start || w.second_groups == w.G), "secateur: second has ", w.second_groups, " groups");
      w.second = floats_of(*second, 0, "second");
    }
  }
  w.mask = optional_data<uint8_t>(mask, at::kByte, O * ((I + 7) / 8), "the bit mask");
  TORCH_CHECK(w.mask || w.start[O] == O * ((I * bits + 7) / 8), "secateur: codes are not of ", I, " input features");
  if (order) check(*order, at::kInt, I, "order");
  w.outlier_start = optional_data<int32_t>(outlier_start, at::kInt, O + 1, "outlier_start");
  if (w.outlier_start) {
    TORCH_CHECK(outlier_column && outlier_value, "secateur: outliers have columns and values");
    w.outlier_column = optional_data<int32_t>(outlier_column, at::kInt, w.outlier_start[O], "outlier_column");
    w.outlier_value = floats_of(*outlier_value, w.outlier_start[O], "outlier_value");
  }
  const Kernels& kernels = *chosen();
  const int64_t scratch = scratch_floats(I, w.G);
  if (T >= FROM_TOKENS) {
    return by_tiles(x, order, bias, O, scratch, [&](int64_t r, float* row, float* spare) { kernels.coded_row(w, r, row, spare); });
  }
  const Laid laid = lay_out(x, w.group_size, w.G, false, order ? order->const_data_ptr<int32_t>() : nullptr);
  Tensor y = at::empty({T, O}, at::kFloat);
  float* out = y.data_ptr<float>();
  at::parallel_for(0, O, grain(I), [&](int64_t first, int64_t last) {
    std::vector<float> buffer(scratch);
    kernels.coded_dot(w, laid.in, first, last, out, O, buffer.data());
  });
  return finish(std::move(y), bias, x.scalar_type());
}

}  // namespace

TORCH_LIBRARY(secateur, m) {
  m.def("sparse_linear(Tensor x, Tensor values, Tensor mask, Tensor start, Tensor? bias) -> Tensor");
  m.def(
      "coded_linear(Tensor x, int bits, Tensor codes, Tensor start, Tensor? count, Tensor? group_start, int group_size, "
      "Tensor? scale, Tensor? zero, Tensor? pair, Tensor? second, int tile_rows, Tensor? table, Tensor? mask, Tensor? order, "
      "Tensor? outlier_start, Tensor? outlier_column, Tensor? outlier_value, Tensor? bias) -> Tensor");
  m.def("use_instructions(str name) -> bool", &use);
  m.def("instructions() -> str", &using_now);
}

TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("sparse_linear", &sparse_linear);
  m.impl("coded_linear", &coded_linear);
}

}  // namespace secateur
