// Products by the bfloat16 instructions of AVX-512 (Cooper Lake, Zen 4 and later), and how inputs and outputs are turned about,
// which AMX does as well.

#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 10)

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace secateur {
namespace {

void lay(const uint16_t* x, int64_t tokens, int64_t I, int64_t depth, uint16_t* to) {
  const __mmask16 some = __mmask16((1u << tokens) - 1);
  const __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_mullo_epi32(place, _mm512_set1_epi32(int(2 * I)));
  int64_t i = 0;
  for (; i + 2 <= I; i += 2, to += 2 * GROUP)
    _mm512_storeu_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), some, at, x + i, 1));
  for (; i < depth; i += 2, to += 2 * GROUP)
    for (int64_t t = 0; t < GROUP; t++) {
      to[2 * t] = i < I && t < tokens ? x[t * I + i] : uint16_t(0);
      to[2 * t + 1] = 0;
    }
}

// R rows and G groups.
template <int R, int G>
inline void part(const Block& b, int64_t row, int64_t group) {
  const uint16_t* const w = b.w + row * b.stride;
  const uint16_t* const x = b.x + group * b.apart;
  float* const y = b.y + row * b.y_stride + group * GROUP;
  __m512 sum[R][G];
  for (int r = 0; r < R; r++)
    for (int g = 0; g < G; g++) sum[r][g] = b.more ? _mm512_loadu_ps(y + r * b.y_stride + g * GROUP) : _mm512_setzero_ps();
  for (int64_t k = 0; k < b.depth; k += 2) {
    __m512bh xs[G];
    for (int g = 0; g < G; g++) xs[g] = (__m512bh)_mm512_loadu_si512(x + g * b.apart + k * GROUP);
    for (int r = 0; r < R; r++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int*>(w + r * b.stride + k));
      for (int g = 0; g < G; g++) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], xs[g], pair);
    }
  }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < G; g++) _mm512_storeu_ps(y + r * b.y_stride + g * GROUP, sum[r][g]);
}

void multiply(const Block& b) {
  int64_t group = 0;
  for (; group + 4 <= b.groups; group += 4)
    for (int64_t row = 0; row < b.rows; row += 4) part<4, 4>(b, row, group);
  for (; group < b.groups; group++)
    for (int64_t row = 0; row < b.rows; row += 16) part<16, 1>(b, row, group);
}

#include "nearest_bf16.inl"

void finish(const float* y, int64_t y_stride, int64_t rows, int64_t tokens, const float* bias, uint16_t* out, int64_t O) {
  const __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_mullo_epi32(place, _mm512_set1_epi32(int(y_stride)));
  for (int64_t r = 0; r < rows; r += 16) {
    const __mmask16 some = rows - r >= 16 ? __mmask16(0xffff) : __mmask16((1u << (rows - r)) - 1);
    const __m512 added = bias ? _mm512_maskz_loadu_ps(some, bias + r) : _mm512_setzero_ps();
    for (int64_t t = 0; t < tokens; t++) {
      const __m512 sums = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, y + r * y_stride + t, 4);
      _mm256_mask_storeu_epi16(out + t * O + r, some, nearest_bf16(_mm512_add_ps(sums, added)));
    }
  }
}

const Products products = {"AVX-512 BF16", lay, multiply, finish};

}  // namespace
}  // namespace secateur

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#include <cpuid.h>

namespace secateur {
const Products* bf16_products() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  const bool rest = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return bf16 && rest ? &products : nullptr;
}
}  // namespace secateur

#else
namespace secateur {
const Products* bf16_products() { return nullptr; }
}  // namespace secateur
#endif
