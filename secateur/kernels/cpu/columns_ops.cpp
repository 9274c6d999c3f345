// The operator for weights by input feature: which inputs are read is found out once, and outputs are dealt out to threads.
//
// O: output features, I: input features, T: tokens, G: groups of inputs, K: inputs that are read.

#include <vector>

#include "columns.h"
#include "operators.h"

namespace secateur {
namespace {

Columns checked(int64_t I, int64_t O, Maybe values, Maybe mask, Maybe start, Maybe before, Maybe codes, int64_t bits,
                int64_t group_size, Maybe scale, Maybe zero) {
  STD_TORCH_CHECK(I >= 1 && O >= 1 && values.has_value() != codes.has_value(), "secateur: a weight has values or codes");
  Columns w = {};
  w.I = I;
  w.O = O;
  if (codes) {
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, "secateur: codes have 2 to 8 bits, not ", bits);
    STD_TORCH_CHECK(group_size >= 1 && scale, "secateur: codes have scales of groups");
    const int64_t groups = (I + group_size - 1) / group_size * O;
    check(*codes, ScalarType::Byte, I * ((O * bits + 7) / 8) + WIDTH, "codes");
    w.codes = data<uint8_t>(*codes);
    w.bits = int(bits);
    w.group_size = group_size;
    w.scale = floats_of(*scale, groups + WIDTH / int64_t(scale->element_size()), "scale");
    if (zero) check(*zero, ScalarType::Byte, groups + WIDTH, "zero");
    w.zero = zero ? data<uint8_t>(*zero) : nullptr;
    return w;
  }
  int64_t count = I * O;
  if (mask) {
    STD_TORCH_CHECK(start && before, "secateur: a mask comes with where values begin");
    check(*mask, ScalarType::Byte, I * ((O + 7) / 8), "the bit mask");
    check(*start, ScalarType::Long, I + 1, "start");
    check(*before, ScalarType::Int, I * ((O + CHUNK - 1) / CHUNK), "before");
    w.mask = data<uint8_t>(*mask);
    w.start = data<int64_t>(*start);
    w.before = data<int32_t>(*before);
    count = w.start[I];
  }
  w.values = floats_of(*values, count + WIDTH / int64_t(values->element_size()), "values");
  return w;
}

// The inputs that are read, and the memory that they lie in.
struct Listed {
  std::vector<int32_t> number;
  std::vector<float> x;
  KeptInputs in;
};

Listed listed(const Tensor& x, Maybe kept) {
  const int64_t T = x.size(0), I = x.size(1);
  Listed found{std::vector<int32_t>(I), {}, {}};
  int64_t K = 0;
  const bool* mask = nullptr;
  if (kept) {
    STD_TORCH_CHECK(kept->dim() == 2 && kept->size(0) == T && kept->size(1) == I, "secateur: the mask is not of the inputs' shape");
    check(*kept, ScalarType::Bool, T * I, "the mask of inputs");
    mask = data<bool>(*kept);
  }
  for (int64_t i = 0; i < I; i++) {
    bool some = !mask;
    for (int64_t t = 0; mask && t < T; t++) some |= mask[t * I + i];
    found.number[K] = int32_t(i);
    K += some;
  }
  found.x.resize(K * T);
  with_values(x, [&](const auto* values) {
    for (int64_t t = 0; t < T; t++)
      for (int64_t k = 0; k < K; k++) {
        const int64_t at = t * I + found.number[k];
        found.x[k * T + t] = !mask || mask[at] ? float(values[at]) : 0.0f;
      }
  });
  found.in = {T, K, found.number.data(), found.x.data()};
  return found;
}

// x Wᵀ for a few tokens: no thread waits for another, as each has outputs of its own.
Tensor by_outputs(const Tensor& x, Maybe kept, const Columns& w, Maybe bias) {
  const Listed list = listed(x, kept);
  const int64_t T = x.size(0), stride = round_up(w.O);
  Tensor y = empty(T, stride, ScalarType::Float), found = empty(T, w.O, x.scalar_type());
  std::optional<Tensor> added;
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->numel() == w.O, "secateur: the bias is not [", w.O, "]");
    float_of(*bias);
    added = as_dtype(bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias), ScalarType::Float);
  }
  float* const sums = static_cast<float*>(y.data_ptr());
  const float* const to_add = added ? data<float>(*added) : nullptr;
  const ColumnKernels& kernels = *chosen()->columns;
  torch::stable::parallel_for(0, stride / WIDTH, grain(WIDTH * std::max<int64_t>(1, list.in.K)), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * WIDTH, last = std::min(end * WIDTH, w.O);
    std::vector<float> scratch(w.codes ? T * round_up(last - first) : 0);
    kernels.dot(w, list.in, first, last, sums, stride, scratch.data());
    with_values(found, [&](const auto* values) {
      auto* const to = const_cast<std::decay_t<decltype(*values)>*>(values);
      for (int64_t t = 0; t < T; t++)
        for (int64_t o = first; o < last; o++)
          to[t * w.O + o] = std::decay_t<decltype(*values)>(sums[t * stride + o] + (to_add ? to_add[o] : 0.0f));
    });
  });
  return found;
}

// x W + bias by torch.
Tensor multiply(const Tensor& x, const Tensor& W_IO, Maybe bias, Tensor y) {
  if (bias) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), bias->get(), x.get(), W_IO.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), x.get(), W_IO.get()));
  }
  return y;
}

// The same for many tokens: tiles of outputs are unpacked, and torch multiplies.
Tensor by_tiles(const Tensor& x, const Columns& w, Maybe values, Maybe bias) {
  const int64_t T = x.size(0);
  // float16 products are slow in torch on a CPU.
  const ScalarType dtype = x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type();
  const bool bf16 = dtype == ScalarType::BFloat16;
  const Tensor source = as_dtype(x, dtype);
  const std::optional<Tensor> added = bias ? std::optional<Tensor>(as_dtype(*bias, dtype)) : std::nullopt;
  if (values && !w.mask && values->scalar_type() == dtype) {
    Tensor all = *values;
    const Tensor whole = narrow(all, 0, 0, w.I * w.O);
    const int64_t sizes[] = {w.I, w.O};
    return as_dtype(multiply(source, torch::stable::view(whole, {sizes, 2}), added, empty(T, w.O, dtype)), x.scalar_type());
  }
  const int64_t size = int64_t(source.element_size());
  const int64_t width = std::min(round_up(w.O), round_up(std::clamp<int64_t>(TILE_BYTES / (w.I * size), LEAST_ROWS, 8 * LEAST_ROWS)));
  Tensor y = empty(T, w.O, dtype), tile = empty(w.I, width, dtype);
  const Kernels& kernels = *chosen();
  const float one = 1;
  for (int64_t first = 0; first < w.O; first += width) {
    const int64_t last = std::min(first + width, w.O), outputs = last - first;
    torch::stable::parallel_for(0, w.I, grain(outputs), [&](int64_t begin, int64_t end) {
      std::vector<float> row(width), scratch(width);
      for (int64_t i = begin; i < end; i++) {
        const int32_t number = int32_t(i);
        uint8_t* const to = static_cast<uint8_t*>(tile.data_ptr()) + i * width * size;
        float* const values = bf16 ? row.data() : reinterpret_cast<float*>(to);
        kernels.columns->dot(w, {1, 1, &number, &one}, first, last, values - first, width, scratch.data());
        if (bf16) kernels.to_bf16(values, reinterpret_cast<uint16_t*>(to), outputs);
      }
    });
    std::optional<Tensor> some = added;
    if (added) some = narrow(*some, 0, first, outputs);
    multiply(source, narrow(tile, 1, 0, outputs), some, narrow(y, 1, first, outputs));
  }
  return as_dtype(y, x.scalar_type());
}

Tensor columns_linear(const Tensor& x_any, int64_t O, Maybe values, Maybe mask, Maybe start, Maybe before, Maybe codes,
                      int64_t bits, int64_t group_size, Maybe scale, Maybe zero, Maybe bias, Maybe kept) {
  check_input(x_any);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const Columns w = checked(x.size(1), O, values, mask, start, before, codes, bits, group_size, scale, zero);
  STD_TORCH_CHECK(!kept || x.size(0) < FROM_TOKENS, "secateur: inputs are passed over for fewer than ", FROM_TOKENS, " tokens");
  if (kept && !kept->is_contiguous()) return by_outputs(x, torch::stable::contiguous(*kept), w, bias);
  return x.size(0) < FROM_TOKENS ? by_outputs(x, kept, w, bias) : by_tiles(x, w, values, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "columns_linear(Tensor x, int outputs, Tensor? values, Tensor? mask, Tensor? start, Tensor? before, Tensor? codes, "
      "int bits, int group_size, Tensor? scale, Tensor? zero, Tensor? bias, Tensor? kept=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) { m.impl("columns_linear", TORCH_BOX(&columns_linear)); }

}  // namespace secateur
