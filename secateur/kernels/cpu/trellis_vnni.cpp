// The kernels for trellis codes on processors with AVX-512 and vpdpbusd, but without VBMI, such as Cascade Lake: each lane takes
// the bytes that its window lies in (vpshufb), and shifts it down.

#include "trellis.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "trellis_words.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#endif

namespace secateur {
namespace {

template <int K>
struct Windows {
  explicit Windows(int states) : mask(_mm512_set1_epi32((1 << states) - 1)) {
    alignas(64) int8_t from[64];
    alignas(64) int32_t by[16];
    for (int lane = 0; lane < 16; lane++) {
      const int bit = (K < 4 ? lane : lane & 7) * K;
      by[lane] = bit & 7;
      for (int byte = 0; byte < 4; byte++) from[4 * lane + byte] = int8_t(byte < 3 ? (bit >> 3) + byte : -1);
    }
    bytes = _mm512_load_si512(from);
    shifts = _mm512_load_si512(by);
  }
  __m512i operator()(__m512i words) const {
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_shuffle_epi8(words, bytes), shifts), mask);
  }
  __m512i bytes, shifts, mask;
};

#include "trellis_avx512.inl"

}  // namespace

const TrellisKernels trellis_vnni = {trellis_dot, trellis_expand, rotate_in, rotate_out};

}  // namespace secateur

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace secateur {
const Kernels* vnni_kernels() {
  __builtin_cpu_init();
  if (!avx2_kernels() || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vnni"))
    return nullptr;
  static const Kernels kernels = [] {
    Kernels found = *avx2_kernels();
    found.name = "AVX-512 VNNI";
    found.trellis = &trellis_vnni;
    return found;
  }();
  return &kernels;
}
}  // namespace secateur

#else
namespace secateur {
const Kernels* vnni_kernels() { return nullptr; }
}  // namespace secateur
#endif
