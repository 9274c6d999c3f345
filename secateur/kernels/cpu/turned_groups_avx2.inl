// `turned_rows` with a lane for each of 8 groups. avx2.cpp includes this inside its namespace.
//
// A code is shifted down for `Meaning`. Inputs are turned 16 groups at a time, of which one half is read.

#include "turned_rows.inl"

inline __m256i two_of(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load_whole(low)), load_whole(high), 1);
}

// The words of 8 groups, from p on, of which `there` bytes are read where it is the end.
template <int bits, bool end>
[[gnu::always_inline]] inline void words_of_groups(const uint8_t* p, int64_t there, __m256i* words) {
  alignas(32) uint8_t last[64] = {};
  if (end) {
    std::memcpy(last, p, there);
    p = last;
  }
  if (bits == 2) {
    words[0] = words[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return;
  }
  __m256i outer = two_of(p, p + 8 * bits), inner = two_of(p + 4 * bits, p + 12 * bits);
  if (bits == 3) {
    const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 3, 4, 5, -1, 6, 7, 8, 9, 9, 10, 11, -1));
    outer = _mm256_shuffle_epi8(outer, apart);
    inner = _mm256_shuffle_epi8(inner, apart);
  }
  const __m256 a = _mm256_castsi256_ps(outer), b = _mm256_castsi256_ps(inner);
  words[0] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
  words[1] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
}

template <int bits, int T, int R, int... j>
[[gnu::always_inline]] inline void add_products(const Meaning& meaning, const __m256i (*words)[2], const float* x, int64_t stride,
                                                __m256 (*part)[T], std::integer_sequence<int, j...>) {
  const auto add = [&](auto number) __attribute__((always_inline)) {
    constexpr int n = decltype(number)::value;
    constexpr bool second = n >= IN_FIRST<bits>;
    __m256 xs[T];
    for (int t = 0; t < T; t++) xs[t] = _mm256_loadu_ps(x + t * stride + 16 * n);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m256 q = meaning(_mm256_srli_epi32(words[r][second], n * bits - (second ? SECOND_AT<bits> : 0)), bits);
      for (int t = 0; t < T; t++) part[r][t] = n == 0 ? _mm256_mul_ps(q, xs[t]) : _mm256_fmadd_ps(q, xs[t], part[r][t]);
    }
  };
  (add(std::integral_constant<int, j>()), ...);
}

// 8 groups of R rows, or fewer at their end, from group g on.
template <int bits, int T, int R, bool end>
[[gnu::always_inline]] inline void turned_step(const Coded& w, const Inputs& in, const Meaning& meaning, int64_t row, int64_t g, int64_t t0,
                                               const float* levels, __m256 (*sum)[T]) {
  const int64_t n = end ? w.G - g : 8, width = w.start[row + 1] - w.start[row];
  __m256i words[R][2];
  __m256 part[R][T];
#pragma GCC unroll 4
  for (int j = 0; j < R; j++) {
    const uint8_t* const p = w.codes + w.start[row + j] + g * 2 * bits;
    fetch(p + R * width);
    words_of_groups<bits, end>(p, n * 2 * bits, words[j]);
  }
  const float* const x = in.x_turned + t0 * in.turned + g / TURNED * TURNED * TURNED + g % TURNED;
  add_products<bits, T, R>(meaning, words, x, in.turned, part, std::make_integer_sequence<int, 16>());
#pragma GCC unroll 4
  for (int j = 0; j < R; j++) {
    const int64_t at = groups_before(w, row + j) + g;
    fetch_grid(w, at + R * w.G);
    const Grid8 grid = grid_8<end>(w, at, g, n, levels, round_up(w.G + WIDTH));
    for (int t = 0; t < T; t++) {
      const __m256 sums = _mm256_loadu_ps(in.group_sum + (t0 + t) * in.sums + g);
      sum[j][t] = _mm256_fmadd_ps(_mm256_fnmadd_ps(grid.zero, sums, part[j][t]), grid.scale, sum[j][t]);
    }
  }
}

template <int bits, int T, int R>
void turned_rows(const Coded& w, const Inputs& in, int64_t row, int64_t t0, const float* levels, float* y, int64_t O) {
  const Meaning meaning(w, row);
  __m256 sum[R][T];
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++) sum[j][t] = _mm256_setzero_ps();
  fetch_outliers(w, row, row + R);
  int64_t g = 0;
  for (; g + 8 <= w.G; g += 8) turned_step<bits, T, R, false>(w, in, meaning, row, g, t0, levels, sum);
  if (g < w.G) turned_step<bits, T, R, true>(w, in, meaning, row, g, t0, levels, sum);
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++)
      y[(t0 + t) * O + row + j] = reduce_add(sum[j][t]) + some_outliers(w, row + j, in.x + (t0 + t) * in.stride);
}
