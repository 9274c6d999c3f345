// The kernels for trellis codes on processors with AVX-512 as of Ice Lake: any eight bits of a 64-bit word become a byte in one
// instruction (vpmultishiftqb), and the bytes of each 32-bit product are added up by another (vpdpbusd).

#include "trellis.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "trellis_words.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c")
#endif

namespace secateur {
namespace {

template <int K>
struct Windows {
  explicit Windows(int states) : mask(_mm512_set1_epi32((1 << states) - 1)) {
    alignas(64) int8_t from[64];
    for (int lane = 0; lane < 16; lane++)
      for (int byte = 0; byte < 4; byte++) from[4 * lane + byte] = int8_t((K < 4 ? lane : lane & 7) * K + 8 * (byte & 1));
    bits = _mm512_load_si512(from);
  }
  __m512i operator()(__m512i words) const { return _mm512_and_si512(_mm512_multishift_epi64_epi8(bits, words), mask); }
  __m512i bits, mask;
};

#include "trellis_avx512.inl"

}  // namespace

const TrellisKernels trellis_vbmi = {trellis_dot, trellis_expand, rotate_in, rotate_out};

}  // namespace secateur

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
