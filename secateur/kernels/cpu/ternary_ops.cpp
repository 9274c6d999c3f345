// The operators for ternary weights in codes of a dictionary: zeros are passed over, of which most of such weights are.
//
// O: output features, I: input features, T: tokens, N: codes, E: sequences of a dictionary, L: nonzero weights of all of them.

#include <cstring>
#include <type_traits>
#include <vector>

#include "operators.h"
#include "plain.h"

namespace secateur {
namespace {

struct Ternary {
  int64_t O, I, N, E, L;
  const uint16_t* codes;
  const int64_t* offset;
  Floats low, high;
  const int16_t* length;
  const int32_t* start;
  const int16_t* item;
};

Ternary checked(int64_t I, const Tensor& codes, const Tensor& offset, const Tensor& low, const Tensor& high, const Tensor& length,
                const Tensor& start, const Tensor& item) {
  check(offset, ScalarType::Long, 1, "offset");
  check(start, ScalarType::Int, 1, "start");
  const int64_t O = offset.numel() - 1, E = start.numel() - 1;
  STD_TORCH_CHECK(low.numel() == O && high.numel() == O, "secateur: rows with values are not the ", O, " with codes");
  check(codes, ScalarType::Short, data<int64_t>(offset)[O], "codes");
  check(length, ScalarType::Short, E, "length");
  check(item, ScalarType::Short, data<int32_t>(start)[E], "item");
  return {O,
          I,
          codes.numel(),
          E,
          item.numel(),
          data<uint16_t>(codes),
          data<int64_t>(offset),
          floats_of(low, O, "low"),
          floats_of(high, O, "high"),
          data<int16_t>(length),
          data<int32_t>(start),
          data<int16_t>(item)};
}

// Calls body(i, whether high) for each nonzero weight of a row. What codes say is checked again: nothing outside is touched.
template <class Body>
inline void nonzeros(const Ternary& w, int64_t o, const Body& body) {
  const int64_t end = std::min(w.offset[o + 1], w.N);
  int64_t at = 0;
  for (int64_t n = std::max<int64_t>(w.offset[o], 0); n < end; n++) {
    const int64_t code = w.codes[n];
    if (code >= w.E) return;
    const int64_t last = std::min<int64_t>(w.start[code + 1], w.L);
    for (int64_t k = std::max(w.start[code], 0); k < last; k++) {
      const int64_t i = at + (w.item[k] >> 1);
      if (uint64_t(i) < uint64_t(w.I)) body(i, w.item[k] & 1);
    }
    at += w.length[code];
  }
}

template <class X>
void decode_rows(const Ternary& w, int64_t begin, int64_t end, X* to) {
  for (int64_t o = begin; o < end; o++, to += w.I) {
    std::memset(to, 0, w.I * sizeof(X));
    const X value[2] = {X(value_at(w.low, o)), X(value_at(w.high, o))};
    nonzeros(w, o, [&](int64_t i, int high) { to[i] = value[high]; });
  }
}

// The dense rows, into a tensor that is there: `to` says their dtype and how long they are.
void decode_into(const Ternary& w, int64_t first, const Tensor& to) {
  with_values(to, [&](const auto* values) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    X* const rows = const_cast<X*>(values);
    torch::stable::parallel_for(0, to.size(0), grain(w.I), [&](int64_t begin, int64_t end) {
      decode_rows(w, first + begin, first + end, rows + begin * w.I);
    });
  });
}

// Sums of up to eight tokens, whose inputs lie side by side: y[t · O + o].
template <int AT_ONCE>
void dot(const Ternary& w, const float* x, int64_t T, int64_t begin, int64_t end, float* y) {
  for (int64_t o = begin; o < end; o++) {
    float sums[AT_ONCE] = {};
    const float value[2] = {value_at(w.low, o), value_at(w.high, o)};
    nonzeros(w, o, [&](int64_t i, int high) {
      const float v = value[high];
      for (int t = 0; t < AT_ONCE; t++) sums[t] += v * x[i * AT_ONCE + t];
    });
    for (int64_t t = 0; t < T; t++) y[t * w.O + o] = sums[t];
  }
}

Tensor by_rows(const Tensor& x, const Ternary& w) {
  const int64_t T = x.size(0), at_once = T == 1 ? 1 : FROM_TOKENS - 1;
  Tensor y = empty(T, w.O, ScalarType::Float);
  std::vector<float> side_by_side(w.I * at_once);
  with_values(x, [&](const auto* values) {
    for (int64_t t = 0; t < T; t++)
      for (int64_t i = 0; i < w.I; i++) side_by_side[i * at_once + t] = float(values[t * w.I + i]);
  });
  float* const out = static_cast<float*>(y.data_ptr());
  torch::stable::parallel_for(0, w.O, grain(w.I), [&](int64_t begin, int64_t end) {
    if (T == 1)
      dot<1>(w, side_by_side.data(), T, begin, end, out);
    else
      dot<FROM_TOKENS - 1>(w, side_by_side.data(), T, begin, end, out);
  });
  return y;
}

// For many tokens some rows at a time are decoded, and torch multiplies.
Tensor by_tiles(const Tensor& x, const Ternary& w) {
  const ScalarType dtype = x.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor source = as_dtype(x, dtype);
  Tensor y = empty(x.size(0), w.O, dtype);
  const int64_t rows = std::clamp<int64_t>(TILE_BYTES / (w.I * int64_t(source.element_size())), LEAST_ROWS, 8 * LEAST_ROWS);
  Tensor tile = empty(std::min(rows, w.O), w.I, dtype);
  for (int64_t first = 0; first < w.O; first += rows) {
    const Tensor some = narrow(tile, 0, 0, std::min(rows, w.O - first));
    decode_into(w, first, some);
    const Tensor part = narrow(y, 1, first, some.size(0));
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(part.get(), source.get(), torch::stable::transpose(some, 0, 1).get()));
  }
  return as_dtype(y, ScalarType::Float);
}

Tensor ternary_linear(const Tensor& x_any, int64_t I, const Tensor& codes, const Tensor& offset, const Tensor& low, const Tensor& high,
                      const Tensor& length, const Tensor& start, const Tensor& item, Maybe bias) {
  check_input(x_any);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const int64_t T = x.size(0);
  STD_TORCH_CHECK(x.size(1) == I, "secateur: the input has ", x.size(1), " features, and the weight ", I);
  const Ternary w = checked(I, codes, offset, low, high, length, start, item);
  const Tensor y = T < FROM_TOKENS ? by_rows(x, w) : by_tiles(x, w);
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->numel() == w.O, "secateur: the bias is not [", w.O, "]");
    float* const sums = static_cast<float*>(y.data_ptr());
    const Tensor whole = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    with_values(whole, [&](const auto* values) {
      for (int64_t t = 0; t < T; t++)
        for (int64_t o = 0; o < w.O; o++) sums[t * w.O + o] += float(values[o]);
    });
  }
  return as_dtype(y, x.scalar_type());
}

// The dense weight in the dtype of `like`.
Tensor ternary_decode(int64_t I, const Tensor& codes, const Tensor& offset, const Tensor& low, const Tensor& high, const Tensor& length,
                      const Tensor& start, const Tensor& item, const Tensor& like) {
  const Ternary w = checked(I, codes, offset, low, high, length, start, item);
  Tensor found = empty(w.O, I, like.scalar_type());
  decode_into(w, 0, found);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "ternary_linear(Tensor x, int features, Tensor codes, Tensor offset, Tensor low, Tensor high, Tensor length, Tensor start, "
      "Tensor item, Tensor? bias) -> Tensor");
  m.def(
      "ternary_decode(int features, Tensor codes, Tensor offset, Tensor low, Tensor high, Tensor length, Tensor start, "
      "Tensor item, Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("ternary_linear", TORCH_BOX(&ternary_linear));
  m.impl("ternary_decode", TORCH_BOX(&ternary_decode));
}

}  // namespace secateur
