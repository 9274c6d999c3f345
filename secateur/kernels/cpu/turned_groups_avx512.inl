// `turned_rows` with a lane for each of 16 groups. avx512.cpp includes this inside its namespace.
//
// A code is shifted to where fractions have their highest bits, as `fractions_16` has it.

#include "turned_rows.inl"

// Which bytes of 16 groups' codes the words of all lanes are made of. What is beyond a group's codes is not looked at.
template <int bits>
inline __m512i bytes_of_words(int from) {
  alignas(64) uint8_t at[64];
  for (int i = 0; i < 64; i++) at[i] = uint8_t(std::min(i / 4 * 2 * bits + from + i % 4, 32 * bits - 1));
  return _mm512_load_si512(at);
}

// The words of 16 groups, from p on, of which `there` bytes are read.
template <int bits, bool end>
inline void words_of_groups(const uint8_t* p, int64_t there, __m512i low, __m512i high, __m512i* words) {
  __m512i a, b = _mm512_setzero_si512();
  if (end) {
    a = _mm512_maskz_loadu_epi8(there >= 64 ? ~__mmask64(0) : (__mmask64(1) << there) - 1, p);
    if (there > 64) b = _mm512_maskz_loadu_epi8((__mmask64(1) << (there - 64)) - 1, p + 64);
  } else {
    a = _mm512_loadu_si512(p);
    if (bits == 3) b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64)));
    if (bits == 4) b = _mm512_loadu_si512(p + 64);
  }
  words[0] = bits == 2 ? a : _mm512_permutex2var_epi8(a, low, b);
  words[1] = bits == 2 ? a : _mm512_permutex2var_epi8(a, high, b);
}

// Code j of each group as a number from 1 to 2.
template <int bits, int j>
inline __m512 fraction_of(const __m512i* words) {
  constexpr bool second = j >= IN_FIRST<bits>;
  constexpr int left = 23 - bits - (j * bits - (second ? SECOND_AT<bits> : 0)), and_or = 0xea;
  const __m512i word = words[second];
  const __m512i there = left >= 0 ? _mm512_slli_epi32(word, left >= 0 ? left : 0) : _mm512_srli_epi32(word, left < 0 ? -left : 0);
  const __m512i fraction = _mm512_set1_epi32(((1 << bits) - 1) << (23 - bits)), one = _mm512_set1_epi32(0x3f800000);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(there, fraction, one, and_or));
}

template <int bits, int T, int R, int... j>
[[gnu::always_inline]] inline void add_products(const __m512i (*words)[2], const float* x, int64_t stride, __m512 (*part)[T],
                                                std::integer_sequence<int, j...>) {
  const auto add = [&](auto number) __attribute__((always_inline)) {
    constexpr int n = decltype(number)::value;
    __m512 xs[T];
    for (int t = 0; t < T; t++) xs[t] = _mm512_loadu_ps(x + t * stride + 16 * n);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m512 q = fraction_of<bits, n>(words[r]);
      for (int t = 0; t < T; t++) part[r][t] = n == 0 ? _mm512_mul_ps(q, xs[t]) : _mm512_fmadd_ps(q, xs[t], part[r][t]);
    }
  };
  (add(std::integral_constant<int, j>()), ...);
}

// 16 groups of R rows, or fewer at their end, from group g on.
template <int bits, int T, int R, bool end>
[[gnu::always_inline]] inline void turned_step(const Coded& w, const Inputs& in, int64_t row, int64_t g, int64_t t0, const float* levels,
                                               __m512i low, __m512i high, __m512 (*sum)[T]) {
  const int64_t n = end ? w.G - g : 16, width = w.start[row + 1] - w.start[row];
  __m512i words[R][2];
  __m512 part[R][T];
#pragma GCC unroll 4
  for (int j = 0; j < R; j++) {
    const uint8_t* const p = w.codes + w.start[row + j] + g * 2 * bits;
    fetch(p + R * width);
    fetch(p + R * width + 64);
    words_of_groups<bits, end>(p, n * 2 * bits, low, high, words[j]);
  }
  const float* const x = in.x_turned + t0 * in.turned + 16 * g;
  add_products<bits, T, R>(words, x, in.turned, part, std::make_integer_sequence<int, 16>());
#pragma GCC unroll 4
  for (int j = 0; j < R; j++) {
    fetch_grid(w, groups_before(w, row + j) + R * w.G + g);
    __m512 scale, zero;
    grid_16<end>(w, groups_before(w, row + j) + g, g, n, levels, round_up(w.G + WIDTH), scale, zero);
    // Of codes c that are read as 1 + c/unit.
    const __m512 unit = _mm512_set1_ps(1 << bits), away = _mm512_mul_ps(scale, _mm512_add_ps(zero, unit));
    scale = _mm512_mul_ps(scale, unit);
    for (int t = 0; t < T; t++) {
      const __m512 sums = _mm512_loadu_ps(in.group_sum + (t0 + t) * in.sums + g);
      sum[j][t] = _mm512_fnmadd_ps(away, sums, _mm512_fmadd_ps(part[j][t], scale, sum[j][t]));
    }
  }
}

template <int bits, int T, int R>
void turned_rows(const Coded& w, const Inputs& in, int64_t row, int64_t t0, const float* levels, float* y, int64_t O) {
  const __m512i low = bytes_of_words<bits>(0), high = bytes_of_words<bits>(SECOND_AT<bits> / 8);
  __m512 sum[R][T];
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++) sum[j][t] = _mm512_setzero_ps();
  fetch_outliers(w, row, row + R);
  int64_t g = 0;
  for (; g + 16 <= w.G; g += 16) turned_step<bits, T, R, false>(w, in, row, g, t0, levels, low, high, sum);
  if (g < w.G) turned_step<bits, T, R, true>(w, in, row, g, t0, levels, low, high, sum);
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++)
      y[(t0 + t) * O + row + j] = _mm512_reduce_add_ps(sum[j][t]) + some_outliers(w, row + j, in.x + (t0 + t) * in.stride);
}
