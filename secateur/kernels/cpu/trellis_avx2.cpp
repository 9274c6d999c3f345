// The kernels for trellis codes on processors with AVX2, eight weights at a time: each lane takes the bytes that its window lies
// in, and shifts it down. Bytes are added up from zero, not from their middle, which is taken away from the sums of the outputs.

#include "trellis.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "trellis_words.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace secateur {
namespace {

using Vector = __m256;
constexpr int64_t LANES = 8;
// Of 16 registers, sums of outputs and tokens take eight.
constexpr int MOST_BLOCKS = 4;
constexpr bool CENTRED = false;
// How far ahead rings are fetched, in bytes.
constexpr int64_t PREFETCH = 2048;

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

inline __m256 load(Floats v, int64_t at) {
  if (v.dtype == Float::f32) return load(static_cast<const float*>(v.data) + at);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(v.data) + at));
  if (v.dtype == Float::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Each lane, or minus it where `signs` has a sign, plus the one that it is paired with.
inline __m256 butterfly(__m256 v, __m256 paired, __m256 signs) { return _mm256_add_ps(paired, _mm256_xor_ps(v, signs)); }

inline __m256 within(__m256 v) {
  v = butterfly(v, _mm256_permute_ps(v, 0xb1), _mm256_setr_ps(0, -0.f, 0, -0.f, 0, -0.f, 0, -0.f));
  v = butterfly(v, _mm256_permute_ps(v, 0x4e), _mm256_setr_ps(0, 0, -0.f, -0.f, 0, 0, -0.f, -0.f));
  return butterfly(v, _mm256_permute2f128_ps(v, v, 1), _mm256_setr_ps(0, 0, 0, 0, -0.f, -0.f, -0.f, -0.f));
}

// Takes states out of the words that they lie in: of the first or the second eight of a block.
template <int K>
struct Windows {
  explicit Windows(int states) : mask(_mm256_set1_epi32((1 << states) - 1)) {
    alignas(32) int8_t from[2][32];
    alignas(32) int32_t by[8];
    for (int half = 0; half < 2; half++)
      for (int lane = 0; lane < 8; lane++) {
        by[lane] = lane * K & 7;
        // The second eight begin K bytes after the first.
        for (int byte = 0; byte < 4; byte++)
          from[half][4 * lane + byte] = int8_t(byte < 3 ? (lane * K >> 3) + byte + (K < 4 ? half * K : 0) : -1);
      }
    for (int half = 0; half < 2; half++) bytes[half] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from[half]));
    shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(by));
  }
  __m256i operator()(uint64_t word, int half) const {
    const __m256i own = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(word)), bytes[half]);
    return _mm256_and_si256(_mm256_srlv_epi32(own, shifts), mask);
  }
  __m256i bytes[2], shifts, mask;
};

// Of one half of the block at `p`, the sums of the bytes.
template <int K>
inline __m256i sums_of(const Windows<K>& states, int half, const uint8_t* p, const uint8_t* ring, bool last) {
  const uint64_t word = K == 4 && half ? high_word_of(p, ring, last) : word_of<K>(p, ring, last);
  const __m256i spread = _mm256_mullo_epi32(states(word, half), _mm256_set1_epi32(int(SPREAD)));
  return _mm256_madd_epi16(_mm256_maddubs_epi16(spread, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

template <int K, int N, int T>
void sum_blocks(const Trellis& w, const Rings& rings, const float* x, int64_t x_stride, float* y, int64_t stride) {
  const Windows<K> states(w.states);
  const bool wraps = (rings.block + N) * BLOCK == w.ring;
  // Outputs that are done together share cache lines; those that come later find theirs there.
  const int64_t ahead = N * BLOCK == w.ring ? PREFETCH : INPUTS_AT_ONCE * w.bytes;
  __m256 sum[N][2][T];
  for (int b = 0; b < N; b++)
    for (int half = 0; half < 2; half++)
      for (int t = 0; t < T; t++) sum[b][half][t] = load(y + t * stride + b * BLOCK + half * LANES);
  const int64_t before = rings.block * 2 * K;
  const uint8_t* p = rings.first + before;
  for (int64_t i = 0; i < rings.count; i++, p += w.bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(p + ahead), _MM_HINT_T0);
    __m256 inputs[T];
    for (int t = 0; t < T; t++) inputs[t] = _mm256_broadcast_ss(x + t * x_stride + i);
#pragma GCC unroll 4
    for (int b = 0; b < N; b++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m256 weights = _mm256_cvtepi32_ps(sums_of<K>(states, half, p + b * 2 * K, p - before, b == N - 1 && wraps));
        for (int t = 0; t < T; t++) sum[b][half][t] = _mm256_fmadd_ps(weights, inputs[t], sum[b][half][t]);
      }
  }
  for (int b = 0; b < N; b++)
    for (int half = 0; half < 2; half++)
      for (int t = 0; t < T; t++) store(y + t * stride + b * BLOCK + half * LANES, sum[b][half][t]);
}

template <int K>
inline void expand_block(const Trellis& w, const uint8_t* ring, int64_t block, void* to, bool bf16) {
  const Windows<K> states(w.states);
  const bool last = (block + 1) * BLOCK == w.ring;
  for (int half = 0; half < 2; half++) {
    const __m256i sums = sums_of<K>(states, half, ring + block * 2 * K, ring, last);
    const __m256 weights = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(MIDDLE)));
    if (!bf16) {
      store(static_cast<float*>(to) + half * LANES, weights);
      continue;
    }
    // To the nearest, ties to even: there is no NaN among them.
    const __m256i bits = _mm256_castps_si256(weights);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(nearest, nearest), 0x88);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + half * LANES), _mm256_castsi256_si128(halves));
  }
}

#include "trellis_bands.inl"

}  // namespace

const TrellisKernels trellis_avx2 = {trellis_dot, trellis_expand, rotate_in, rotate_out};

}  // namespace secateur

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
