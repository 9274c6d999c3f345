// The operator for trellis codes: inputs are scaled and rotated once, bands of rings dealt out to threads, outputs rotated back.
//
// O: output features, I: input features, T: tokens, G: groups of inputs, S: pieces of them, which are added up apart.

#include <cmath>
#include <utility>

#include "operators.h"
#include "trellis.h"

namespace secateur {
namespace {

// So many pieces of bands are enough for every thread to have as much as the others; of fewer inputs than these none is made.
constexpr int64_t PIECES = 64, LEAST_INPUTS = 2 * INPUTS_AT_ONCE;

struct Operands {
  Trellis w;
  int64_t O, block_in, block_out;
  Floats scale_in, scale_out;
};

Operands checked(int64_t I, int64_t bits, int64_t states, int64_t ring, int64_t block_out, int64_t block_in, const Tensor& codes,
                 const Tensor& scale_out, const Tensor& scale_in) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, "secateur: trellis codes have 2 to 4 bits, not ", bits);
  STD_TORCH_CHECK(scale_in.dim() == 1 && scale_out.dim() == 1 && scale_in.numel() == I, "secateur: scale_in is not [", I, "]");
  const int64_t O = scale_out.numel();
  STD_TORCH_CHECK(ring >= 1 && ring <= O && O % ring == 0, "secateur: ", O, " outputs are no rings of ", ring);
  STD_TORCH_CHECK(states >= 1 && states <= 16 && states <= ring * bits, "secateur: rings of ", ring, " codes of ", bits,
                  " bits have no states of ", states);
  for (const auto& [block, n] : {std::pair{block_out, O}, std::pair{block_in, I}})
    STD_TORCH_CHECK(block >= 1 && !(block & (block - 1)) && n % block == 0, "secateur: ", n, " features have no blocks of ", block);
  const int64_t bytes = (ring * bits + 7) / 8;
  check(codes, ScalarType::Byte, O / ring * I * bytes + WIDTH, "codes");
  return {{I, int(bits), int(states), ring, bytes, data<uint8_t>(codes)},
          O,
          block_in,
          block_out,
          floats_of(scale_in, I, "scale_in"),
          floats_of(scale_out, O, "scale_out")};
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// The inputs as kernels want them, and the memory that they lie in: one piece, since a token has little time to wait for more.
struct Rotated {
  Tensor memory;
  Inputs in;
};

Rotated rotated(const Tensor& x, const Operands& of, int64_t G) {
  const int64_t T = x.size(0), I = of.w.I, stride = round_up(I), sums = round_up(G);
  Rotated found{empty(T, stride + sums, ScalarType::Float), {}};
  float *const rows = floats(found.memory), *const group_sums = rows + T * stride;
  const TrellisKernels& kernels = *chosen()->trellis;
  const Floats values = {x.data_ptr(), float_of(x)};
  torch::stable::parallel_for(0, T, grain(I), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* const row = rows + t * stride;
      kernels.rotate_in(values, t * I, of.scale_in, I, of.block_in, row);
      std::fill(row + I, row + stride, 0.0f);
      for (int64_t g = 0; g < G; g++)
        group_sums[t * sums + g] = sum_of(row, g * INPUTS_AT_ONCE, std::min((g + 1) * INPUTS_AT_ONCE, I));
    }
  });
  found.in = {T, stride, rows, nullptr, group_sums, sums};
  return found;
}

// Outputs that are not yet rotated, to outputs in the dtype of the inputs.
Tensor finish(const Tensor& y, const Operands& of, Maybe bias, ScalarType dtype) {
  const int64_t T = y.size(0), O = of.O;
  float* const sums = floats(y);
  const float factor = SCALE / std::sqrt(float(of.block_in) * float(of.block_out));
  const TrellisKernels& kernels = *chosen()->trellis;
  std::optional<Tensor> added;
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->numel() == O, "secateur: the bias is not [", O, "]");
    added = as_dtype(bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias), ScalarType::Float);
  }
  torch::stable::parallel_for(0, T, grain(O), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* const row = sums + t * O;
      kernels.rotate_out(row, of.scale_out, factor, O, of.block_out);
      if (added)
        for (int64_t o = 0; o < O; o++) row[o] += floats(*added)[o];
    }
  });
  return as_dtype(y, dtype);
}

// The sums of outputs, a few tokens at once: how inputs are cut up depends on the weight alone, so that threads do not show.
Tensor by_bands(const Tensor& x, const Operands& of) {
  const Trellis& w = of.w;
  const int64_t T = x.size(0), O = of.O, bands = O / w.ring, G = (w.I + INPUTS_AT_ONCE - 1) / INPUTS_AT_ONCE;
  const int64_t wanted = std::clamp<int64_t>((PIECES + bands - 1) / bands, 1, std::max<int64_t>(1, w.I / LEAST_INPUTS));
  const int64_t inputs = (G + wanted - 1) / wanted * INPUTS_AT_ONCE, S = (w.I + inputs - 1) / inputs;
  const Rotated source = rotated(x, of, G);
  Tensor parts = empty(S * T, O, ScalarType::Float);
  float* const sums = floats(parts);
  const TrellisKernels& kernels = *chosen()->trellis;
  torch::stable::parallel_for(0, bands * S, grain(w.ring * inputs), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t band = piece / S, s = piece % S;
      float* const y = sums + s * T * O + band * w.ring;
      kernels.dot(w, source.in, band, s * inputs, std::min((s + 1) * inputs, w.I), y, O);
    }
  });
  for (int64_t s = 1; s < S; s++)
    for (int64_t k = 0; k < T * O; k++) sums[k] += sums[s * T * O + k];
  return narrow(parts, 0, 0, T);
}

// The same for many tokens: some bands at a time are decoded, and torch multiplies.
Tensor by_tiles(const Tensor& x, const Operands& of) {
  const Trellis& w = of.w;
  const int64_t T = x.size(0), O = of.O, bands = O / w.ring;
  const Rotated inputs = rotated(x, of, 0);
  const Kernels& kernels = *chosen();
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  const ScalarType dtype = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor source = inputs.memory;
  if (bf16) {
    source = empty(T, inputs.in.stride, dtype);
    torch::stable::parallel_for(0, T, grain(w.I), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        kernels.to_bf16(inputs.in.x + t * inputs.in.stride, static_cast<uint16_t*>(source.data_ptr()) + t * inputs.in.stride, w.I);
    });
  }
  source = narrow(source, 1, 0, w.I);
  Tensor y = empty(T, O, dtype);
  const int64_t size = bf16 ? 2 : 4;
  const int64_t rows = std::clamp<int64_t>(TILE_BYTES / (w.I * size), LEAST_ROWS, 8 * LEAST_ROWS);
  const int64_t at_once = std::clamp<int64_t>(rows / w.ring, 1, bands);
  Tensor tile = empty(w.I, at_once * w.ring, dtype);
  for (int64_t first = 0; first < bands; first += at_once) {
    const int64_t count = std::min(at_once, bands - first), columns = count * w.ring;
    torch::stable::parallel_for(0, count * w.I, grain(w.ring), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t band = begin / w.I, i = begin % w.I, until = std::min(w.I, i + end - begin);
        uint8_t* const to = static_cast<uint8_t*>(tile.data_ptr()) + (i * at_once + band) * w.ring * size;
        kernels.trellis->expand(w, first + band, i, until, to, at_once * w.ring, bf16);
        begin += until - i;
      }
    });
    const Tensor part = narrow(y, 1, first * w.ring, columns), weight = narrow(tile, 1, 0, columns);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(part.get(), source.get(), weight.get()));
  }
  return as_dtype(y, ScalarType::Float);
}

Tensor trellis_linear(const Tensor& x_any, int64_t bits, int64_t states, int64_t ring, int64_t block_out, int64_t block_in,
                      const Tensor& codes, const Tensor& scale_out, const Tensor& scale_in, Maybe bias) {
  check_input(x_any);
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const Operands of = checked(x.size(1), bits, states, ring, block_out, block_in, codes, scale_out, scale_in);
  return finish(x.size(0) < FROM_TOKENS ? by_bands(x, of) : by_tiles(x, of), of, bias, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "trellis_linear(Tensor x, int bits, int states, int ring, int block_out, int block_in, Tensor codes, Tensor scale_out, "
      "Tensor scale_in, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) { m.impl("trellis_linear", TORCH_BOX(&trellis_linear)); }

}  // namespace secateur
