// What the checks of kernels have in common: random weights and inputs in memory that is exactly as long as it has to be.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "plain.h"
#include "trellis.h"

using namespace secateur;

namespace {

std::mt19937 draw(0);
int64_t padding = WIDTH;

int64_t below(int64_t n) { return int64_t(draw() % uint64_t(n)); }
bool chance(double share) { return draw() < share * 4294967296.0; }

template <class T>
T one_of(const std::vector<T>& choices) {
  return choices[below(choices.size())];
}

// Memory of so many bytes and no more: either from the heap, where the address sanitizer watches both ends, or up to the end
// of a page, behind which no instruction can read. The sanitizer does not see masked loads and gathers.
class Exact {
 public:
  explicit Exact(size_t bytes) : bytes_(bytes) {
    if (chance(0.5)) {
      heap_.reset(new uint8_t[bytes]);
      data_ = heap_.get();
      return;
    }
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<uint8_t*>(memory) + pages, page, PROT_NONE)) std::abort();
    mapped_ = memory;
    mapped_bytes_ = pages + page;
    data_ = static_cast<uint8_t*>(memory) + pages - bytes;
  }
  Exact(Exact&& other) : bytes_(other.bytes_), data_(other.data_), heap_(std::move(other.heap_)) {
    std::swap(mapped_, other.mapped_);
    mapped_bytes_ = other.mapped_bytes_;
  }
  ~Exact() {
    if (mapped_) munmap(mapped_, mapped_bytes_);
  }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  uint8_t* data_ = nullptr;
  std::unique_ptr<uint8_t[]> heap_;
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
};

// What one weight and its inputs lie in.
class Memory {
 public:
  template <class T>
  T* exactly(const std::vector<T>& values, int64_t bytes_after = 0) {
    owned_.emplace_back(values.size() * sizeof(T) + bytes_after);
    uint8_t* data = owned_.back().data();
    std::memset(data, 0, owned_.back().bytes());
    if (!values.empty()) std::memcpy(data, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<T*>(data);
  }

  float* floats(int64_t n) { return exactly(std::vector<float>(n)); }

  // Values between 2^-5 and 2^3, of either sign if it is wanted.
  Floats values(int64_t n, Float dtype, bool either_sign, int64_t bytes_after = 0) {
    std::vector<uint16_t> halves;
    std::vector<float> wholes;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t sign = either_sign && chance(0.5), exponent = uint32_t(below(8)), fraction = draw();
      if (dtype == Float::f32) wholes.push_back(from_bits(sign << 31 | (exponent + 122) << 23 | (fraction & 0x7fffff)));
      if (dtype == Float::bf16) halves.push_back(uint16_t(sign << 15 | (exponent + 122) << 7 | (fraction & 127)));
      if (dtype == Float::f16) halves.push_back(uint16_t(sign << 15 | (exponent + 10) << 10 | (fraction & 1023)));
    }
    const void* data = dtype == Float::f32 ? static_cast<void*>(exactly(wholes, bytes_after)) : exactly(halves, bytes_after);
    return {data, dtype};
  }

 private:
  std::vector<Exact> owned_;
};

std::vector<uint8_t> random_bytes(int64_t n) {
  std::vector<uint8_t> bytes(n);
  for (uint8_t& byte : bytes) byte = uint8_t(draw());
  return bytes;
}

// A mask [O, ⌈I/8⌉], and how many bits each row has.
std::vector<uint8_t> random_mask(int64_t O, int64_t I, std::vector<int64_t>& count) {
  const int64_t B = (I + 7) / 8;
  std::vector<uint8_t> mask(O * B);
  count.assign(O, 0);
  for (int64_t r = 0; r < O; r++) {
    const double density = one_of<double>({0, 0.1, 0.5, 0.9, 1});
    for (int64_t i = 0; i < I; i++)
      if (chance(density)) {
        mask[r * B + i / 8] |= uint8_t(1 << i % 8);
        count[r]++;
      }
  }
  return mask;
}

template <class T>
std::vector<T> running_sum(const std::vector<int64_t>& counts) {
  std::vector<T> start = {0};
  for (int64_t count : counts) start.push_back(T(start.back() + count));
  return start;
}

Inputs random_inputs(Memory& memory, int64_t T, int64_t I, int64_t group_size, int64_t G, bool split) {
  const int64_t stride = round_up(I), sums = G ? round_up(G) : 0, turned = group_size == TURNED ? turned_floats(G) : 0;
  std::vector<float> x(T * stride), x_split(T * stride), group_sum(T * sums), x_turned(T * turned);
  std::normal_distribution<float> normal;
  for (int64_t t = 0; t < T; t++) {
    for (int64_t i = 0; i < I; i++) {
      x[t * stride + i] = normal(draw);
      x_split[t * stride + i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = x[t * stride + i];
      if (G) group_sum[t * sums + i / group_size] += x[t * stride + i];
    }
    if (turned) turn(&x[t * stride], I, G, &x_turned[t * turned]);
  }
  const float* sum_of_groups = G ? memory.exactly(group_sum) : nullptr;
  return {T, stride, memory.exactly(x), split ? memory.exactly(x_split) : nullptr, sum_of_groups, sums,
          turned ? memory.exactly(x_turned) : nullptr, turned};
}

void fail(const char* what, const Kernels& kernels, int64_t weight) {
  std::printf("%s of %s differs from plain C++ at weight %ld\n", what, kernels.name, long(weight));
  std::exit(1);
}

}  // namespace
