// Where the windows of sixteen trellis codes are in memory: in one 64-bit word for codes of two and three bits, with the second
// eight in another, 32 bits on, for those of four.

#pragma once

#include "trellis_plain.h"

namespace secateur {
namespace {

// The rings of consecutive inputs, and which of their blocks comes next.
struct Rings {
  const uint8_t* first;
  int64_t count;
  int64_t block = 0;
};

template <class Word>
inline uint64_t word_at(const uint8_t* p) {
  Word word;
  std::memcpy(&word, p, sizeof(Word));
  return word;
}

// The word of a block, of K · 2 bytes at `p`. In the last one windows go on at the beginning of the ring.
template <int K>
inline uint64_t word_of(const uint8_t* p, const uint8_t* ring, bool last) {
  if (!last) return word_at<uint64_t>(p);
  const uint64_t start = word_at<uint16_t>(ring);
  if constexpr (K == 2) return word_at<uint32_t>(p) | start << 32;
  if constexpr (K == 3) return word_at<uint32_t>(p) | word_at<uint16_t>(p + 4) << 32 | start << 48;
  return word_at<uint64_t>(p);
}

// That of its second eight codes of four bits.
inline uint64_t high_word_of(const uint8_t* p, const uint8_t* ring, bool last) {
  return last ? word_at<uint32_t>(p + 4) | word_at<uint16_t>(ring) << 32 : word_at<uint64_t>(p + 4);
}

}  // namespace
}  // namespace secateur
