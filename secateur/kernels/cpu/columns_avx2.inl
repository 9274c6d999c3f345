// Weights by input feature with AVX2: what columns.inl asks for. Included by avx2.cpp, whose ways to read codes and values these
// are.

namespace columns {

using V = __m256;
constexpr int LANES = 8;

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V set(float value) { return _mm256_set1_ps(value); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
inline V load_values(Floats v, int64_t at) {
  if (v.dtype == Float::f32) return load(static_cast<const float*>(v.data) + at);
  return secateur::widen(load_whole(static_cast<const uint16_t*>(v.data) + at), v.dtype);
}
inline V load_bytes(const uint8_t* p) { return bytes_8(p); }

// bfloat16 outputs are taken apart, but under a mask: of every 32 the even ones stand before the odd ones.
enum Order { NATURAL, SPLIT };

inline void join(float* y) {
  V joined[4];
  for (int i = 0; i < 2; i++) {
    const V even = load(y + 8 * i), odd = load(y + 16 + 8 * i);
    const V low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    joined[2 * i] = _mm256_permute2f128_ps(low, high, 0x20);
    joined[2 * i + 1] = _mm256_permute2f128_ps(low, high, 0x31);
  }
  for (int i = 0; i < 4; i++) store(y + 8 * i, joined[i]);
}

template <Float dtype>
constexpr Kind KIND = dtype == Float::bf16 ? Kind::bf16 : dtype == Float::f16 ? Kind::f16 : Kind::f32;

template <Float dtype>
struct Values {
  static constexpr int SIZE = dtype == Float::f32 ? 4 : 2, N = 8 / SIZE;
  static constexpr Order ORDER = dtype == Float::bf16 ? SPLIT : NATURAL;
  const uint8_t* p;

  Values() = default;
  Values(const Columns& w, int64_t i, int64_t o) : p(static_cast<const uint8_t*>(w.values.data) + (i * w.O + o) * SIZE) {}
  const uint8_t* at() const { return p; }

  template <bool end>
  void next(V* w, int64_t) {
    if constexpr (dtype == Float::bf16) {
      const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
      for (int n = 0; n < 2; n++) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * n));
        w[n] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        w[n + 2] = _mm256_castsi256_ps(_mm256_and_si256(both, odd));
      }
    } else {
      for (int n = 0; n < N; n++) {
        if constexpr (dtype == Float::f16)
          w[n] = _mm256_cvtph_ps(load_whole(p + 16 * n));
        else
          w[n] = load(reinterpret_cast<const float*>(p) + 8 * n);
      }
    }
    p += 64;
  }
};

// 32 outputs of a mask, whatever the values are.
template <Float dtype>
struct Masked {
  static constexpr int SIZE = dtype == Float::f32 ? 4 : 2, N = 4;
  static constexpr Order ORDER = NATURAL;
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
    std::memcpy(&bits, mask, end ? ((left < 32 ? left : 32) + 7) / 8 : 4);
    mask += 4;
    for (int n = 0; n < N; n++) w[n] = expand<KIND<dtype>>(p, bits, n);
  }
};

template <int bits>
struct Codes {
  static constexpr int N = 4;
  static constexpr float UNIT = 1, ONE = 0;
  const uint8_t* p;

  Codes() = default;
  Codes(const Columns& w, int64_t i, int64_t o) : p(w.codes + i * ((w.O * bits + 7) / 8) + o * bits / 8) {}
  const uint8_t* at() const { return p; }

  template <bool end>
  void next(V* w, int64_t) {
    const __m256i shifts = shifts_8(bits), low_bits = _mm256_set1_epi32((1 << bits) - 1);
    for (int n = 0; n < N; n++, p += bits)
      w[n] = bits == 8 ? bytes_8(p) : _mm256_cvtepi32_ps(_mm256_and_si256(codes_8(p, bits, shifts), low_bits));
  }
};

#include "columns.inl"

}  // namespace columns

const ColumnKernels column_kernels = {columns::dot};
