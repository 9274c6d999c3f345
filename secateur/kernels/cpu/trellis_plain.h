// Trellis codes in plain C++: what the vector kernels do to rings that are not of sixteens, and all that other processors have.

#pragma once

#include <algorithm>
#include <vector>

#include "plain.h"
#include "trellis.h"

namespace secateur {
namespace {

// A ring's weights, one after the other.
class PlainRing {
 public:
  explicit PlainRing(const Trellis& w) : w_(w), bits_(w.bytes + 8), weights_(w.ring) {}

  const std::vector<float>& weights(const uint8_t* ring) {
    // Behind the last bit, which need not end a byte, the first ones again: then no window wraps.
    std::fill(std::copy(ring, ring + w_.bytes, bits_.begin()), bits_.end(), uint8_t(0));
    const int64_t end = w_.ring * w_.bits;
    bits_[end >> 3] &= uint8_t((1 << (end & 7)) - 1);
    for (int64_t b = 0; b < w_.states; b++) bits_[(end + b) >> 3] |= uint8_t(bit_at(bits_.data(), b) << ((end + b) & 7));
    for (int64_t t = 0; t < w_.ring; t++) {
      uint32_t word;
      std::memcpy(&word, bits_.data() + (t * w_.bits >> 3), 4);
      const uint32_t spread = (word >> (t * w_.bits & 7) & ((1u << w_.states) - 1)) * SPREAD;
      const uint32_t pairs = (spread & 0xff00ff) + (spread >> 8 & 0xff00ff);
      weights_[t] = float(int((pairs & 0xffff) + (pairs >> 16)) - MIDDLE);
    }
    return weights_;
  }

 private:
  const Trellis& w_;
  std::vector<uint8_t> bits_;
  std::vector<float> weights_;
};

inline const uint8_t* ring_at(const Trellis& w, int64_t band, int64_t i) { return w.codes + (band * w.I + i) * w.bytes; }

inline void plain_trellis_dot(const Trellis& w, const Inputs& in, int64_t band, int64_t first, int64_t last, float* y, int64_t stride) {
  PlainRing ring(w);
  for (int64_t t = 0; t < in.T; t++) std::fill_n(y + t * stride, w.ring, 0.0f);
  for (int64_t i = first; i < last; i++) {
    const float* weights = ring.weights(ring_at(w, band, i)).data();
    for (int64_t t = 0; t < in.T; t++) {
      const float x = in.x[t * in.stride + i];
      float* const sums = y + t * stride;
      for (int64_t o = 0; o < w.ring; o++) sums[o] += x * weights[o];
    }
  }
}

inline void plain_trellis_expand(const Trellis& w, int64_t band, int64_t first, int64_t last, void* to, int64_t stride, bool bf16) {
  PlainRing ring(w);
  for (int64_t i = first; i < last; i++) {
    const std::vector<float>& weights = ring.weights(ring_at(w, band, i));
    const int64_t at = (i - first) * stride;
    if (bf16)
      std::transform(weights.begin(), weights.end(), static_cast<uint16_t*>(to) + at, to_bf16);
    else
      std::copy(weights.begin(), weights.end(), static_cast<float*>(to) + at);
  }
}

// Sums and differences of values that are `from`, 2 · from, … apart, in blocks.
inline void plain_hadamard(float* x, int64_t n, int64_t block, int64_t from = 1) {
  for (int64_t h = from; h < block; h *= 2)
    for (int64_t b = 0; b < n; b += 2 * h)
      for (int64_t i = b; i < b + h; i++) {
        const float sum = x[i] + x[i + h], difference = x[i] - x[i + h];
        x[i] = sum;
        x[i + h] = difference;
      }
}

}  // namespace
}  // namespace secateur
