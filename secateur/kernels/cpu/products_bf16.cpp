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

// 16 rows of 16 doublewords become columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  // Of rows i to i + 3, column c of each four columns.
  for (int i = 0; i < 16; i += 4)
    for (int c = 0; c < 4; c += 2) {
      u[i + c] = _mm512_unpacklo_epi64(t[i + c / 2], t[i + c / 2 + 2]);
      u[i + c + 1] = _mm512_unpackhi_epi64(t[i + c / 2], t[i + c / 2 + 2]);
    }
  constexpr int even = 0x88, odd = 0xdd;
  for (int c = 0; c < 4; c++) {
    const __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], even), b = _mm512_shuffle_i32x4(u[c], u[4 + c], odd);
    const __m512i d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], even), e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], odd);
    r[c] = _mm512_shuffle_i32x4(a, d, even);
    r[4 + c] = _mm512_shuffle_i32x4(b, e, even);
    r[8 + c] = _mm512_shuffle_i32x4(a, d, odd);
    r[12 + c] = _mm512_shuffle_i32x4(b, e, odd);
  }
}

void lay(const uint16_t* x, int64_t tokens, int64_t I, int64_t depth, uint16_t* to) {
  for (int64_t i = 0; i < depth; i += STEP, to += STEP * GROUP) {
    const __mmask32 some = I - i >= STEP ? ~__mmask32(0) : (__mmask32(1) << (I - i)) - 1;
    __m512i pairs[16];
    for (int64_t t = 0; t < GROUP; t++)
      pairs[t] = t < tokens ? _mm512_maskz_loadu_epi16(some, x + t * I + i) : _mm512_setzero_si512();
    transpose(pairs);
    for (int64_t k = 0; k < 16; k++) _mm512_storeu_si512(to + 2 * k * GROUP, pairs[k]);
  }
}

// R rows and G groups.
template <int R, int G>
inline void part(const Block& b, int64_t row, int64_t group) {
  const uint16_t* const w = b.w + row * ROW_STRIDE;
  const uint16_t* const x = b.x + group * b.apart;
  float* const y = b.y + row * b.y_stride + group * GROUP;
  __m512 sum[R][G];
  for (int r = 0; r < R; r++)
    for (int g = 0; g < G; g++) sum[r][g] = b.more ? _mm512_loadu_ps(y + r * b.y_stride + g * GROUP) : _mm512_setzero_ps();
  for (int64_t k = 0; k < b.depth; k += 2) {
    __m512bh xs[G];
    for (int g = 0; g < G; g++) xs[g] = (__m512bh)_mm512_loadu_si512(x + g * b.apart + k * GROUP);
    for (int r = 0; r < R; r++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int*>(w + r * ROW_STRIDE + k));
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

// `store(sums, some, t, r)` takes the sums of 16 rows for a token, of which `some` are there.
template <class Store>
inline void finish_with(const float* y, int64_t y_stride, int64_t rows, int64_t tokens, const float* bias, const Store& store) {
  for (int64_t r = 0; r < rows; r += 16) {
    const __mmask16 some = rows - r >= 16 ? __mmask16(0xffff) : __mmask16((1u << (rows - r)) - 1);
    const __m512 added = bias ? _mm512_maskz_loadu_ps(some, bias + r) : _mm512_setzero_ps();
    for (int64_t t0 = 0; t0 < tokens; t0 += GROUP) {
      __m512i sums[16];
      for (int64_t j = 0; j < 16; j++)
        sums[j] = r + j < rows ? _mm512_loadu_si512(y + (r + j) * y_stride + t0) : _mm512_setzero_si512();
      transpose(sums);
      for (int64_t t = t0; t < tokens && t < t0 + GROUP; t++)
        store(_mm512_add_ps(_mm512_castsi512_ps(sums[t - t0]), added), some, t, r);
    }
  }
}

void finish(const float* y, int64_t y_stride, int64_t rows, int64_t tokens, const float* bias, uint16_t* out, int64_t O) {
  finish_with(y, y_stride, rows, tokens, bias, [=](__m512 sums, __mmask16 some, int64_t t, int64_t r) {
    _mm256_mask_storeu_epi16(out + t * O + r, some, nearest_bf16(sums));
  });
}

void finish_floats(const float* y, int64_t y_stride, int64_t rows, int64_t tokens, const float* bias, float* out, int64_t O) {
  finish_with(y, y_stride, rows, tokens, bias, [=](__m512 sums, __mmask16 some, int64_t t, int64_t r) {
    _mm512_mask_storeu_ps(out + t * O + r, some, sums);
  });
}

void lay_columns(const uint16_t* x, int64_t tokens, int64_t I, int64_t depth, uint16_t* to) {
  const auto row = [&](int64_t t) {
    return t < tokens ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * I))) : _mm512_setzero_si512();
  };
  for (int64_t t = 0; t < depth; t += 2, to += 2 * GROUP)
    _mm512_storeu_si512(to, _mm512_or_si512(row(t), _mm512_slli_epi32(row(t + 1), 16)));
}

void columns_as_rows(const uint16_t* laid, int64_t depth, uint16_t* to) {
  for (int64_t t = 0; t < depth; t += STEP, laid += STEP * GROUP) {
    __m512i pairs[16];
    for (int64_t k = 0; k < 16; k++) pairs[k] = _mm512_loadu_si512(laid + 2 * k * GROUP);
    transpose(pairs);
    for (int64_t r = 0; r < GROUP; r++) _mm512_storeu_si512(to + r * ROW_STRIDE + t, pairs[r]);
  }
}

const Products products = {"AVX-512 BF16", lay, multiply, finish, finish_floats, lay_columns, columns_as_rows};

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
