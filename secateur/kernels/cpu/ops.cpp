// The operators: what is checked, how inputs are laid out, how rows are dealt out to threads.
//
// O: output features, I: input features, T: tokens, G: groups of a row.

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "by_blocks.h"
#include "crew.h"
#include "operators.h"
#include "plain.h"
#include "step.h"

namespace secateur {
namespace {

const Kernels*& in_use() {
  static const Kernels* kernels = avx512_kernels() ? avx512_kernels() : vnni_kernels() ? vnni_kernels() : avx2_kernels() ? avx2_kernels() : &plain_kernels;
  return kernels;
}

// "avx512", "avx512vnni", "avx2" or "plain"; what is there when this processor cannot run them is left unchanged, and false is
// returned.
bool use(const std::string& name) {
  const Kernels* kernels = name == "avx512"       ? avx512_kernels()
                           : name == "avx512vnni" ? vnni_kernels()
                           : name == "avx2"       ? avx2_kernels()
                           : name == "plain"      ? &plain_kernels
                                                  : nullptr;
  if (kernels) in_use() = kernels;
  return kernels != nullptr;
}

std::string using_now() { return in_use()->name; }

const Products*& products_in_use() {
  static const Products* products = amx_products() ? amx_products() : bf16_products();
  return products;
}

// "amx", "avx512bf16" or "torch", which multiplies tiles of unpacked rows everywhere; false as above.
bool use_products(const std::string& name) {
  const Products* products = name == "amx" ? amx_products() : name == "avx512bf16" ? bf16_products() : nullptr;
  if (products || name == "torch") products_in_use() = products;
  return products || name == "torch";
}

std::string products_now() { return multiplying() ? multiplying()->name : "torch"; }

// Whether the products that are in use can be had of these inputs and these kernels.
bool has_products(const Tensor& x) { return multiplying() && x.scalar_type() == ScalarType::BFloat16 && chosen()->coded_bf16; }

template <class T>
const T* optional_data(Maybe t, ScalarType dtype, int64_t at_least, const char* name) {
  if (!t) return nullptr;
  check(*t, dtype, at_least, name);
  return data<T>(*t);
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
    for (int64_t i = 0; i < I; i++) to[i] = float(x[i]);
}

Laid lay_out(const Tensor& x, int64_t group_size, int64_t G, bool split, const int32_t* order) {
  const int64_t T = x.size(0), I = x.size(1), stride = round_up(I), sums = round_up(G);
  const int64_t turned = group_size == TURNED ? turned_floats(G) : 0, floats = stride * (split ? 2 : 1) + sums + turned;
  Laid laid{empty(T, floats, ScalarType::Float), {}};
  float* const rows = static_cast<float*>(laid.memory.data_ptr());
  float* const splits = rows + T * stride;
  float* const group_sums = rows + T * (floats - sums - turned);
  float* const turns = rows + T * (floats - turned);
  for (int64_t t = 0; t < T; t++) {
    float* to = rows + t * stride;
    with_values(x, [&](const auto* values) { lay_row(values + t * I, order, I, to); });
    std::fill(to + I, to + stride, 0.0f);
    if (split) chosen()->step->split(to, stride, splits + t * stride);
    for (int64_t g = 0; g < sums; g++) {
      group_sums[t * sums + g] = sum_of(to, std::min(g * group_size, I), std::min((g + 1) * group_size, I));
    }
    if (turned) turn(to, I, G, turns + t * turned);
  }
  laid.in = {T, stride, rows, split ? splits : nullptr, G ? group_sums : nullptr, sums, turned ? turns : nullptr, turned};
  return laid;
}

// Sums and bias in the dtype of the inputs.
Tensor finish(const Tensor& y, Maybe bias, ScalarType dtype) {
  if (bias) {
    const int64_t T = y.size(0), O = y.size(1);
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->numel() == O, "secateur: the bias is not [", O, "]");
    float* const sums = static_cast<float*>(y.data_ptr());
    const Tensor whole = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    with_values(whole, [&](const auto* values) {
      for (int64_t t = 0; t < T; t++)
        for (int64_t o = 0; o < O; o++) sums[t * O + o] += float(values[o]);
    });
  }
  return as_dtype(y, dtype);
}

// x Wᵀ by unpacking tiles of rows; `row(r, w, scratch)` unpacks one in float32, columns in stored order.
template <class Row>
Tensor by_tiles(const Tensor& x, Maybe order, Maybe bias, int64_t O, int64_t floats, const Row& row) {
  const int64_t T = x.size(0), I = x.size(1), stride = round_up(I);
  // float16 products are slow in torch on a CPU.
  const ScalarType dtype = x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type();
  const Tensor source = in_order(x, order ? data<int32_t>(*order) : nullptr, dtype);
  const std::optional<Tensor> added = bias ? std::optional<Tensor>(as_dtype(*bias, dtype)) : std::nullopt;
  Tensor y = empty(T, O, dtype);
  const int64_t rows = std::clamp<int64_t>(TILE_BYTES / (stride * int64_t(source.element_size())), LEAST_ROWS, 8 * LEAST_ROWS);
  Tensor tile = empty(std::min(rows, O), stride, dtype);
  const Kernels& kernels = *chosen();
  for (int64_t first = 0; first < O; first += rows) {
    const int64_t count = std::min(rows, O - first);
    torch::stable::parallel_for(0, count, grain(I), [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(stride + floats);
      for (int64_t r = begin; r < end; r++) {
        if (dtype == ScalarType::Float) {
          row(first + r, static_cast<float*>(tile.data_ptr()) + r * stride, buffer.data());
        } else {
          row(first + r, buffer.data(), buffer.data() + stride);
          kernels.to_bf16(buffer.data(), static_cast<uint16_t*>(tile.data_ptr()) + r * stride, I);
        }
      }
    });
    const Tensor part = narrow(y, 1, first, count);
    Tensor unpacked = narrow(tile, 0, 0, count);
    unpacked = narrow(unpacked, 1, 0, I);
    const Tensor weight = torch::stable::transpose(unpacked, 0, 1);
    if (added) {
      Tensor all = *added;
      const Tensor some = narrow(all, 0, first, count);
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(part.get(), some.get(), source.get(), weight.get(), 1, 1));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(part.get(), source.get(), weight.get()));
    }
  }
  return as_dtype(y, x.scalar_type());
}

Sparse checked_sparse(int64_t I, const Tensor& values, const Tensor& mask, const Tensor& start) {
  const int64_t O = start.numel() - 1;
  Sparse w;
  w.I = I;
  check(start, ScalarType::Long, 1, "start");
  w.start = data<int64_t>(start);
  check(mask, ScalarType::Byte, O * ((I + 7) / 8), "the bit mask");
  w.mask = data<uint8_t>(mask);
  w.values = floats_of(values, w.start[O] + WIDTH / values.element_size(), "values");
  return w;
}

Tensor sparse_linear(const Tensor& x_any, const Tensor& values, const Tensor& mask, const Tensor& start, Maybe bias) {
  check_input(x_any);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const int64_t T = x.size(0), I = x.size(1), O = start.numel() - 1;
  const Sparse w = checked_sparse(I, values, mask, start);
  const Kernels& kernels = *chosen();
  if (T >= FROM_TOKENS && has_products(x) && w.values.dtype == Float::bf16) {
    return by_blocks(x, nullptr, bias, O, 0, [&](int64_t first, int64_t last, int64_t k0, int64_t k1, int64_t* at, uint16_t* to, int64_t stride, float*) {
      kernels.sparse_bf16(w, first, last, k0, k1, at, to, stride);
    });
  }
  if (T >= FROM_TOKENS) {
    return by_tiles(x, std::nullopt, bias, O, 0, [&](int64_t r, float* row, float*) { kernels.sparse_row(w, r, row); });
  }
  const Laid laid = lay_out(x, 0, 0, w.values.dtype == Float::bf16, nullptr);
  Tensor y = empty(T, O, ScalarType::Float);
  float* out = static_cast<float*>(y.data_ptr());
  torch::stable::parallel_for(0, O, grain(I), [&](int64_t first, int64_t last) { kernels.sparse_dot(w, laid.in, first, last, out, O); });
  return finish(y, bias, x.scalar_type());
}

Coded checked_coded(int64_t I, int64_t bits, const Tensor& codes, const Tensor& start, Maybe count, Maybe group_start,
                    int64_t group_size, Maybe scale, Maybe zero, Maybe pair, Maybe second, int64_t tile_rows, Maybe table,
                    Maybe mask, Maybe order, Maybe outlier_start, Maybe outlier_column, Maybe outlier_value) {
  const int64_t O = start.numel() - 1;
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "secateur: codes have 1 to 8 bits, not ", bits);
  STD_TORCH_CHECK(int(scale.has_value()) + int(pair.has_value() && second.has_value()) + int(table.has_value()) == 1,
              "secateur: codes have one grid");
  STD_TORCH_CHECK(mask.has_value() == count.has_value(), "secateur: a mask comes with the counts of its rows");
  check(start, ScalarType::Long, 1, "start");
  Coded w = {};
  w.I = I;
  w.bits = int(bits);
  w.start = data<int64_t>(start);
  check(codes, ScalarType::Byte, w.start[O] + WIDTH, "codes");
  w.codes = data<uint8_t>(codes);
  w.count = optional_data<int32_t>(count, ScalarType::Int, O, "count");
  w.group_start = optional_data<int64_t>(group_start, ScalarType::Long, O + 1, "group_start");
  if (table) {
    w.table = floats_of(*table, O << bits, "table");
  } else {
    STD_TORCH_CHECK(group_size >= 1, "secateur: groups of ", group_size);
    w.group_size = std::max<int64_t>(1, std::min(group_size, I));
    w.G = (I + w.group_size - 1) / w.group_size;
    const int64_t groups = w.group_start ? w.group_start[O] : O * w.G;
    if (scale) {
      w.scale = floats_of(*scale, groups, "scale");
      if (zero && zero->scalar_type() == ScalarType::Float)
        w.level = floats_of(*zero, groups, "zero");
      else
        w.zero = optional_data<uint8_t>(zero, ScalarType::Byte, groups, "zero");
    } else {
      STD_TORCH_CHECK(tile_rows >= 1, "secateur: tiles of ", tile_rows, " rows");
      w.tile_rows = tile_rows;
      w.nibbles = pair->dim() == 1;
      check(*pair, ScalarType::Byte, w.nibbles ? groups : 2 * groups, "pair");
      w.pair = data<uint8_t>(*pair);
      const int64_t tiles = (O + tile_rows - 1) / tile_rows;
      STD_TORCH_CHECK(second->dim() == 3 && second->size(0) == tiles && second->size(2) == 4, "secateur: second is not [tiles, groups, 4]");
      w.second_groups = second->size(1);
      STD_TORCH_CHECK(w.second_groups <= w.G && (w.group_start || w.second_groups == w.G), "secateur: second has ", w.second_groups, " groups");
      w.second = floats_of(*second, 0, "second");
    }
  }
  w.mask = optional_data<uint8_t>(mask, ScalarType::Byte, O * ((I + 7) / 8), "the bit mask");
  STD_TORCH_CHECK(w.mask || w.start[O] == O * ((I * bits + 7) / 8), "secateur: codes are not of ", I, " input features");
  if (order) check(*order, ScalarType::Int, I, "order");
  w.outlier_start = optional_data<int32_t>(outlier_start, ScalarType::Int, O + 1, "outlier_start");
  if (w.outlier_start) {
    STD_TORCH_CHECK(outlier_column && outlier_value, "secateur: outliers have columns and values");
    w.outlier_column = optional_data<int32_t>(outlier_column, ScalarType::Int, w.outlier_start[O], "outlier_column");
    w.outlier_value = floats_of(*outlier_value, w.outlier_start[O], "outlier_value");
  }
  return w;
}

Tensor coded_linear(const Tensor& x_any, int64_t bits, const Tensor& codes, const Tensor& start, Maybe count, Maybe group_start,
                    int64_t group_size, Maybe scale, Maybe zero, Maybe pair, Maybe second, int64_t tile_rows, Maybe table,
                    Maybe mask, Maybe order, Maybe outlier_start, Maybe outlier_column, Maybe outlier_value, Maybe bias) {
  check_input(x_any);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const int64_t T = x.size(0), I = x.size(1), O = start.numel() - 1;
  const Coded w = checked_coded(I, bits, codes, start, count, group_start, group_size, scale, zero, pair, second, tile_rows, table,
                                mask, order, outlier_start, outlier_column, outlier_value);
  const Kernels& kernels = *chosen();
  const int64_t scratch = scratch_floats(I, w.G);
  if (T >= FROM_TOKENS && has_products(x) && kernels.coded_bf16_takes(w)) {
    return by_blocks(x, order ? data<int32_t>(*order) : nullptr, bias, O, scratch,
                     [&](int64_t first, int64_t last, int64_t k0, int64_t k1, int64_t*, uint16_t* to, int64_t stride, float* spare) {
                       kernels.coded_bf16(w, first, last, k0, k1, to, stride, spare);
                     });
  }
  if (T >= FROM_TOKENS) {
    return by_tiles(x, order, bias, O, scratch, [&](int64_t r, float* row, float* spare) { kernels.coded_row(w, r, row, spare); });
  }
  const Laid laid = lay_out(x, w.group_size, w.G, false, order ? data<int32_t>(*order) : nullptr);
  Tensor y = empty(T, O, ScalarType::Float);
  float* out = static_cast<float*>(y.data_ptr());
  torch::stable::parallel_for(0, O, grain(I), [&](int64_t first, int64_t last) {
    std::vector<float> buffer(scratch);
    kernels.coded_dot(w, laid.in, first, last, out, O, buffer.data());
  });
  return finish(y, bias, x.scalar_type());
}

#include "linears.inl"
#include "stack.inl"

}  // namespace

const Kernels* chosen() { return in_use(); }
const Products* multiplying() { return products_in_use(); }

STABLE_TORCH_LIBRARY(secateur, m) {
  m.def("sparse_linear(Tensor x, Tensor values, Tensor mask, Tensor start, Tensor? bias) -> Tensor");
  m.def(
      "coded_linear(Tensor x, int bits, Tensor codes, Tensor start, Tensor? count, Tensor? group_start, int group_size, "
      "Tensor? scale, Tensor? zero, Tensor? pair, Tensor? second, int tile_rows, Tensor? table, Tensor? mask, Tensor? order, "
      "Tensor? outlier_start, Tensor? outlier_column, Tensor? outlier_value, Tensor? bias) -> Tensor");
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("make_stack(Tensor[] parts, int[] forms, Tensor[] norms, float eps, int head, float scale) -> int");
  m.def("free_stack(int stack) -> bool");
  m.def(
      "stack_step(int stack, int first, int last, Tensor x, Tensor cos, Tensor sin, Tensor? mask, Tensor? norm, Tensor(a!) cache, "
      "int filled) -> Tensor");
  m.def("use_instructions(str name) -> bool");
  m.def("instructions() -> str");
  m.def("use_products(str name) -> bool");
  m.def("products() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("coded_linear", TORCH_BOX(&coded_linear));
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("stack_step", TORCH_BOX(&stack_step));
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CompositeExplicitAutograd, m) {
  m.impl("make_stack", TORCH_BOX(&make_stack));
  m.impl("free_stack", TORCH_BOX(&free_stack));
  m.impl("use_instructions", TORCH_BOX(&use));
  m.impl("instructions", TORCH_BOX(&using_now));
  m.impl("use_products", TORCH_BOX(&use_products));
  m.impl("products", TORCH_BOX(&products_now));
}

}  // namespace secateur
