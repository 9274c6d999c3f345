// What a decoder layer does to a token between its products, which every instruction set compiles for itself.
//
// O: output features, I: input features, D: features of a head, S: tokens in the cache.

#pragma once

#include <math.h>

#include "rows.h"

namespace secateur {

// A dense weight, [O, I] without gaps.
struct Dense {
  int64_t I;
  Floats values;
};

// One head's query, which is scaled, and the keys and values that it looks at, each [S, D] without gaps.
struct Head {
  int64_t D, S;
  const float* query;
  Floats keys, values;
  const uint8_t* seen;  // [S], 0 for what is hidden; null: nothing is
};

struct StepKernels {
  // As `Kernels::coded_dot`.
  void (*dense_dot)(const Dense&, const Inputs&, int64_t first, int64_t last, float* y, int64_t O);
  // x / √(mean of x² + eps) · weight for n features; in place, too.
  void (*rms_norm)(const float* x, Floats weight, int64_t n, float eps, float* y);
  // Turns D features by angles of these cosines and sines, the first half with the second.
  void (*turn)(float* head, const float* cos, const float* sin, int64_t D);
  // What a head gives, [D]; zeros where all is hidden. `scores` has room for round_up(S).
  void (*attend)(const Head&, float* scores, float* y);
  // silu(gate) · up for n features.
  void (*gated)(const float* gate, const float* up, int64_t n, float* y);
  // Inputs of one token for kernels: `sums` of groups up to a multiple of WIDTH, and columns split as `Inputs::x_split` has them.
  void (*group_sums)(const float* x, int64_t I, int64_t group_size, int64_t G, float* sums);
  void (*split)(const float* x, int64_t stride, float* to);
};

}  // namespace secateur
