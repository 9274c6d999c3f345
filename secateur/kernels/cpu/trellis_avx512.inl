// Trellis codes in 512 bits, sixteen weights at a time. Included under a target, inside a namespace, once there is
//
//   template <int K> struct Windows { explicit Windows(int states); __m512i operator()(__m512i words) const; };
//
// which makes the states of sixteen weights of the words that they lie in.

using Vector = __m512;
constexpr int64_t LANES = 16;
// Of 32 registers, sums of outputs and tokens take these many.
constexpr int MOST_BLOCKS = 16;
constexpr bool CENTRED = true;
// How far ahead of it rings are fetched, in bytes.
constexpr int64_t PREFETCH = 2048;

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }

inline __m512 load(Floats v, int64_t at) {
  if (v.dtype == Float::f32) return load(static_cast<const float*>(v.data) + at);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(v.data) + at));
  if (v.dtype == Float::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Each lane, or minus it where the mask says so, plus the one that it is paired with.
inline __m512 butterfly(__m512 v, __m512 paired, __mmask16 minus) {
  return _mm512_mask_sub_ps(_mm512_add_ps(paired, v), minus, paired, v);
}

inline __m512 within(__m512 v) {
  v = butterfly(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
  v = butterfly(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
  v = butterfly(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
  return butterfly(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
}

template <int K>
inline __m512i words_of(const uint8_t* p, const uint8_t* ring, bool last) {
  const __m512i words = _mm512_set1_epi64(int64_t(word_of<K>(p, ring, last)));
  if constexpr (K < 4) return words;
  return _mm512_mask_broadcastq_epi64(words, 0xf0, _mm_cvtsi64_si128(int64_t(high_word_of(p, ring, last))));
}

inline __m512 weights_of(__m512i states) {
  const __m512i spread = _mm512_mullo_epi32(states, _mm512_set1_epi32(int(SPREAD)));
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_set1_epi32(-MIDDLE), spread, _mm512_set1_epi8(1)));
}

template <int K, int N, int T>
void sum_blocks(const Trellis& w, const Rings& rings, const float* x, int64_t x_stride, float* y, int64_t stride) {
  const Windows<K> states(w.states);
  const bool wraps = (rings.block + N) * BLOCK == w.ring;
  // Outputs that are done together share cache lines; those that come later find theirs there.
  const int64_t ahead = N * BLOCK == w.ring ? PREFETCH : INPUTS_AT_ONCE * w.bytes;
  __m512 sum[N][T];
  for (int b = 0; b < N; b++)
    for (int t = 0; t < T; t++) sum[b][t] = load(y + t * stride + b * BLOCK);
  const int64_t before = rings.block * 2 * K;
  const uint8_t* p = rings.first + before;
  for (int64_t i = 0; i < rings.count; i++, p += w.bytes) {
    for (int line = 0; line < N * 2 * K; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + ahead + line), _MM_HINT_T0);
    __m512 inputs[T];
    for (int t = 0; t < T; t++) inputs[t] = _mm512_set1_ps(x[t * x_stride + i]);
#pragma GCC unroll 16
    for (int b = 0; b < N; b++) {
      const __m512 weights = weights_of(states(words_of<K>(p + b * 2 * K, p - before, b == N - 1 && wraps)));
      for (int t = 0; t < T; t++) sum[b][t] = _mm512_fmadd_ps(weights, inputs[t], sum[b][t]);
    }
  }
  for (int b = 0; b < N; b++)
    for (int t = 0; t < T; t++) store(y + t * stride + b * BLOCK, sum[b][t]);
}

template <int K>
inline void expand_block(const Trellis& w, const uint8_t* ring, int64_t block, void* to, bool bf16) {
  const bool last = (block + 1) * BLOCK == w.ring;
  const __m512 weights = weights_of(Windows<K>(w.states)(words_of<K>(ring + block * 2 * K, ring, last)));
  if (!bf16) return store(static_cast<float*>(to), weights);
  // To the nearest, ties to even: there is no NaN among them.
  const __m512i bits = _mm512_castps_si512(weights);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16)));
}

#include "trellis_bands.inl"
