// What the operator for trellis codes hands to the kernels, and what those of every instruction set are.
//
// O: output features, I: input features, T: tokens, K: bits of a code, B: bytes of a ring, R: outputs of a ring.

#pragma once

#include <cstdint>

#include "rows.h"

namespace secateur {

// The state of a weight is spread by this factor; the sum of the four bytes of the product stands for its value, and this
// much of it is the middle. Kernels leave out the scale, which is the same for all weights.
constexpr uint32_t SPREAD = 0x83DCD12Du;
constexpr int MIDDLE = 510;
constexpr float SCALE = 1 / 147.8f;

// Rings of R outputs each, one for every input. A ring is R·K bits; the state of its weight t is `states` bits from bit t·K
// on, and after the last bit of a ring comes its first.
struct Trellis {
  int64_t I;
  int bits, states;
  int64_t ring;          // R
  int64_t bytes;         // B, ⌈R·K/8⌉
  const uint8_t* codes;  // [O / R, I, B]; no byte behind them is read
};

// Vector kernels take weights in sixteens, which are 2·K whole bytes; rings of other lengths are for the plain ones.
constexpr int64_t BLOCK = 16;
// Inputs that a kernel goes over before it turns to the next outputs of the same rings, which are still in the cache then. They
// are the groups whose sums it is given.
constexpr int64_t INPUTS_AT_ONCE = 256;

struct TrellisKernels {
  // The sums over the inputs from `first`, where a group begins, to before `last`, for the outputs of a band of rings:
  // y[t · stride + o].
  void (*dot)(const Trellis&, const Inputs&, int64_t band, int64_t first, int64_t last, float* y, int64_t stride);
  // The weights of those inputs one after the other, to[(i − first) · stride + o], as float32 or bfloat16.
  void (*expand)(const Trellis&, int64_t band, int64_t first, int64_t last, void* to, int64_t stride, bool bf16);
  // x ⊙ scale, then Hadamard transforms of `block` values each, not normalised.
  void (*rotate_in)(Floats x, int64_t at, Floats scale, int64_t n, int64_t block, float* to);
  // The transforms, then row ⊙ scale · factor, in place.
  void (*rotate_out)(float* row, Floats scale, float factor, int64_t n, int64_t block);
};

extern const TrellisKernels trellis_plain, trellis_avx2, trellis_vnni, trellis_vbmi;

}  // namespace secateur
