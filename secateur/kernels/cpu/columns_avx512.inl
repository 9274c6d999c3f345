// Weights by input feature with AVX-512: what columns.inl asks for. Included by avx512.cpp, whose ways to read codes and values
// these are.

namespace columns {

using V = __m512;
constexpr int LANES = 16;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V set(float value) { return _mm512_set1_ps(value); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
inline V load_values(Floats v, int64_t at) { return load16(v, at); }
inline V load_bytes(const uint8_t* p) { return bytes_16(p); }

// bfloat16 outputs are taken apart: of every 32 the even ones stand before the odd ones.
enum Order { NATURAL, SPLIT };

inline void join(float* y) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 even = load(y), odd = load(y + 16);
  store(y, _mm512_permutex2var_ps(even, low, odd));
  store(y + 16, _mm512_permutex2var_ps(even, high, odd));
}

// 32 values of 16 bits, or 16 of 32.
template <Float dtype>
inline void widen(__m512i v, V* w) {
  if constexpr (dtype == Float::bf16) {
    w[0] = even_bf16(v);
    w[1] = odd_bf16(v);
  } else if constexpr (dtype == Float::f16) {
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
  } else {
    w[0] = _mm512_castsi512_ps(v);
  }
}

template <Float dtype>
struct Values {
  static constexpr int SIZE = dtype == Float::f32 ? 4 : 2, N = 4 / SIZE;
  static constexpr Order ORDER = dtype == Float::bf16 ? SPLIT : NATURAL;
  const uint8_t* p;

  Values() = default;
  Values(const Columns& w, int64_t i, int64_t o) : p(static_cast<const uint8_t*>(w.values.data) + (i * w.O + o) * SIZE) {}
  const uint8_t* at() const { return p; }

  template <bool end>
  void next(V* w, int64_t) {
    widen<dtype>(_mm512_loadu_si512(p), w);
    p += 64;
  }
};

template <Float dtype>
struct Masked {
  static constexpr int SIZE = dtype == Float::f32 ? 4 : 2, N = 4 / SIZE;
  static constexpr Order ORDER = dtype == Float::bf16 ? SPLIT : NATURAL;
  const uint8_t *p, *mask;

  Masked() = default;
  Masked(const Columns& w, int64_t i, int64_t o) {
    p = static_cast<const uint8_t*>(w.values.data) + values_before(w, i, o) * SIZE;
    mask = w.mask + i * ((w.O + 7) / 8) + o / 8;
  }
  const uint8_t* at() const { return p; }

  template <bool end>
  void next(V* w, int64_t left) {
    uint32_t bits = 0;
    std::memcpy(&bits, mask, end ? ((left < 16 * N ? left : 16 * N) + 7) / 8 : 2 * N);
    mask += 2 * N;
    if constexpr (N == 2)
      widen<dtype>(_mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(p)), w);
    else
      w[0] = _mm512_maskz_expand_ps(__mmask16(bits), _mm512_loadu_ps(p));
    p += SIZE * __builtin_popcount(bits);
  }
};

template <int bits>
struct Codes {
  static constexpr int N = 4;
  static constexpr float UNIT = bits == 8 ? 1 : 1 << bits, ONE = bits == 8 ? 0 : 1;
  const uint8_t* p;

  Codes() = default;
  Codes(const Columns& w, int64_t i, int64_t o) : p(w.codes + i * ((w.O * bits + 7) / 8) + o * bits / 8) {}
  const uint8_t* at() const { return p; }

  template <bool end>
  void next(V* w, int64_t) {
    const __m512i shifts = shifts_to_fraction(bits);
    for (int n = 0; n < N; n++, p += 2 * bits) w[n] = bits == 8 ? bytes_16(p) : fractions_16<bits & 7>(p, shifts);
  }
};

#include "columns.inl"

}  // namespace columns

const ColumnKernels column_kernels = {columns::dot};
