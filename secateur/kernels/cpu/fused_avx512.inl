// Products with codes where they stand, without making rows of weights first. avx512.cpp includes this inside its namespace.

// Codes of up to seven bits as numbers from 1 to 2: they become the highest bits of the fraction of a float. That takes one
// instruction of a kind of which two can run at a time, where a lookup has to wait for the one unit that moves bytes about.
inline __m512i shifts_to_fraction(int bits) {
  alignas(64) uint8_t at[64] = {};
  for (int j = 0; j < 16; j++) at[4 * j + 2] = uint8_t((bits * (bits <= 4 ? j : j % 8) - (7 - bits)) & 63);
  return _mm512_load_si512(at);
}

template <int bits>
inline __m512 fractions_16(const uint8_t* p, __m512i shifts) {
  const __m512i fraction = _mm512_set1_epi32(((1 << bits) - 1) << (23 - bits)), one = _mm512_set1_epi32(0x3f800000);
  constexpr int and_or = 0xea;
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(shifts, quads(p, bits)), fraction, one, and_or));
}

// Scales of the blocks of row r, for codes c that are read as u + c/unit: unit · scale. What zero points and u take away, scale ·
// (zero + unit · u) times the inputs of a group, begins the sums.
template <int T>
inline const float* block_scales(const Coded& w, const Inputs& in, int64_t r, int64_t blocks, int64_t block, float unit, float u,
                                 int64_t t0, Stream& s, __m512* sum) {
  const int64_t Gs = round_up(w.G + WIDTH);
  for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
  if (w.table.data) return s.repeated;
  if (w.second.data && r / w.tile_rows != s.tile) tile_levels(w, s.tile = r / w.tile_rows, s.levels, Gs);
  const float* group_sum = in.group_sum + t0 * in.sums;
  for_grid(w, groups_before(w, r), w.G, s.levels, Gs, [&](int64_t g, __m512 scale, __m512 zero) {
    const __m512 away = _mm512_mul_ps(scale, _mm512_add_ps(zero, _mm512_set1_ps(unit * u)));
    for (int t = 0; t < T; t++) sum[t] = _mm512_fnmadd_ps(away, _mm512_loadu_ps(group_sum + t * in.sums + g), sum[t]);
    _mm512_storeu_ps(s.scale + g, _mm512_mul_ps(scale, _mm512_set1_ps(unit)));
  });
  const int64_t repeat = (w.group_size + block - 1) / block;
  if (repeat == 1) return s.scale;
  for (int64_t g = 0, b = 0; g < w.G; g++)
    for (const int64_t end = b + repeat < blocks ? b + repeat : blocks; b < end; b++) s.repeated[b] = s.scale[g];
  return s.repeated;
}

// The sums of four vectors.
inline __m128 reduce_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// R rows, D apart, whose codes are multiplied where they stand: all weights are stored, codes have 2 to 8 bits, and
// groups are of whole blocks of columns, which have one scale.
template <bool lookup, int bits, int block, int T, int R>
void fused_rows(const Coded& w, const Inputs& in, int64_t first, int64_t D, int64_t t0, float* y, int64_t O, Stream* streams) {
  const int64_t blocks = (w.I + block - 1) / block;
  const __m512i shifts = lookup ? shifts_16(bits) : shifts_to_fraction(bits);
  const float unit = bits == 8 ? 1 : float(1 << bits), u = bits == 8 ? 0 : 1;
  __m512 table[R], sum[R][T];
  const uint8_t* p[R];
  const float* scales[R];
  for (int j = 0; j < R; j++) {
    const int64_t r = first + j * D;
    p[j] = w.codes + w.start[r];
    table[j] = lookup ? row_table(w, r) : _mm512_setzero_ps();
    scales[j] = block_scales<T>(w, in, r, blocks, block, unit, u, t0, streams[j], sum[j]);
  }
  const float* x = in.x + t0 * in.stride;
  // One offset for all rows: advanced each by itself, the compiler keeps pointers in vectors, and fetches them from memory.
  for (int64_t b = 0, offset = 0; b < blocks; b++, x += block, offset += block / 8 * bits) {
    __m512 part[R][T];
    for (int j = 0; j < R; j++) _mm_prefetch(reinterpret_cast<const char*>(p[j] + offset + PREFETCH), _MM_HINT_T0);
    for (int i = 0; i < block; i += 16) {
      __m512 xs[T];
      for (int t = 0; t < T; t++) xs[t] = _mm512_loadu_ps(x + t * in.stride + i);
      for (int j = 0; j < R; j++) {
        const uint8_t* at = p[j] + offset + i / 8 * bits;
        const __m512 q = bits == 8 ? bytes_16(at) : lookup ? codes_16(at, shifts, table[j]) : fractions_16<bits & 7>(at, shifts);
        for (int t = 0; t < T; t++)
          part[j][t] = i == 0 ? _mm512_mul_ps(q, xs[t]) : _mm512_fmadd_ps(q, xs[t], part[j][t]);
      }
    }
    for (int j = 0; j < R; j++) {
      const __m512 s = _mm512_set1_ps(scales[j][b]);
      for (int t = 0; t < T; t++) sum[j][t] = _mm512_fmadd_ps(part[j][t], s, sum[j][t]);
    }
  }
  alignas(16) float totals[R][T];
  // One row is added up as four are: what is computed side by side does not show.
  if constexpr (R == 4 && T == 1)
    _mm_store_ps(totals[0], reduce_four(sum[0][0], sum[1][0], sum[2][0], sum[3][0]));
  else if constexpr (R == 1 && T == 1)
    totals[0][0] = _mm_cvtss_f32(reduce_four(sum[0][0], sum[0][0], sum[0][0], sum[0][0]));
  else
    for (int j = 0; j < R; j++)
      for (int t = 0; t < T; t++) totals[j][t] = _mm512_reduce_add_ps(sum[j][t]);
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++) {
      const int64_t r = first + j * D;
      y[(t0 + t) * O + r] = totals[j][t] + some_outliers(w, r, in.x + (t0 + t) * in.stride);
    }
}

template <bool lookup, int bits, int block, int T>
void fused_tokens(const Coded& w, const Inputs& in, int64_t first, int64_t last, int64_t t0, float* y, int64_t O, float* scratch) {
  constexpr int R = T == 1 ? ROWS : 1;
  const int64_t blocks = (w.I + block - 1) / block;
  Stream streams[R];
  for (Stream& s : streams) scratch = s.lay_out(w, blocks, scratch);
  const int64_t D = (last - first) / R;
  for (int64_t r = first; r < first + D; r++) fused_rows<lookup, bits, block, T, R>(w, in, r, D, t0, y, O, streams);
  for (int64_t r = first + R * D; r < last; r++) fused_rows<lookup, bits, block, T, 1>(w, in, r, 1, t0, y, O, streams);
}

template <int bits>
void fused(const Coded& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O, float* scratch) {
  if (bits <= 4 && w.table.data) {
    SECATEUR_BY_TOKENS((fused_tokens<bits <= 4, bits, 64, T>(w, in, first, last, t0, y, O, scratch)))
  } else if (w.group_size >= w.I || w.group_size % 64 == 0) {
    SECATEUR_BY_TOKENS((fused_tokens<false, bits, 64, T>(w, in, first, last, t0, y, O, scratch)))
  } else if (w.group_size % 32 == 0) {
    SECATEUR_BY_TOKENS((fused_tokens<false, bits, 32, T>(w, in, first, last, t0, y, O, scratch)))
  } else {
    SECATEUR_BY_TOKENS((fused_tokens<false, bits, 16, T>(w, in, first, last, t0, y, O, scratch)))
  }
}
