// What the operator for weights by input feature hands to the kernels, and what those of every instruction set are.
//
// O: output features, I: input features, T: tokens, G: groups of inputs, K: inputs that are read.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rows.h"

namespace secateur {

// Outputs of a chunk, before each of which the values under a mask are counted.
constexpr int64_t CHUNK = 256;

// Either values or codes; pointers to what a weight does not have are null. After the last value, code, scale and zero point
// there are bytes to read, as WIDTH demands.
struct Columns {
  int64_t I, O;
  Floats values;          // [I, O], or those under the mask, input after input
  const uint8_t* mask;    // [I, ⌈O/8⌉]; null: all are there
  const int64_t* start;   // [I + 1]: where the values of an input begin
  const int32_t* before;  // [I, ⌈O/CHUNK⌉]: how many of them stand before each chunk
  const uint8_t* codes;   // [I, ⌈O·bits/8⌉]
  int bits;
  int64_t group_size;
  Floats scale;         // [G, O]
  const uint8_t* zero;  // [G, O]; null: 2^(bits − 1)
};

// The inputs that are read, by rising number.
struct KeptInputs {
  int64_t T, K;
  const int32_t* number;  // [K]
  const float* x;         // [K, T]
};

// Where the values of an input begin that belong to the outputs from o on, a multiple of 64.
inline int64_t values_before(const Columns& w, int64_t i, int64_t o) {
  const int64_t chunk = o / CHUNK;
  const uint8_t* mask = w.mask + i * ((w.O + 7) / 8);
  int64_t found = w.start[i] + w.before[i * ((w.O + CHUNK - 1) / CHUNK) + chunk];
  for (int64_t b = chunk * CHUNK / 8; b < o / 8; b += 8) {
    uint64_t word;
    std::memcpy(&word, mask + b, 8);
    found += __builtin_popcountll(word);
  }
  return found;
}

struct ColumnKernels {
  // The outputs from `first`, a multiple of WIDTH, to before `last`: y[t · stride + o], and what follows them up to a multiple
  // of WIDTH is written, too. `scratch` has room for T · round_up(last − first).
  void (*dot)(const Columns&, const KeptInputs&, int64_t first, int64_t last, float* y, int64_t stride, float* scratch);
};

extern const ColumnKernels columns_plain;

}  // namespace secateur
