// Codes that are multiplied where they stand, a block of columns of one group after the other. avx2.cpp includes this inside its
// namespace.

// Σ scale · zero · Σx over the groups of a row: what the zero points take away.
inline float zeros_dot(const float* scale, const float* zero, const float* sums, int64_t G) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t g = 0; g < G; g += 8) {
    const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(scale + g), _mm256_loadu_ps(zero + g));
    sum = _mm256_fmadd_ps(product, _mm256_loadu_ps(sums + g), sum);
  }
  return reduce_add(sum);
}

// Scales of the blocks of row r. What its zero points take away goes to y.
inline const float* block_scales(const Coded& w, const Inputs& in, int64_t r, int64_t blocks, int64_t block, int64_t t0,
                                 int64_t T, float* y, int64_t O, Stream& s) {
  const int64_t Gs = round_up(w.G + WIDTH);
  if (w.table.data) {
    for (int64_t t = t0; t < t0 + T; t++) y[t * O + r] = 0;
    return s.repeated;
  }
  if (w.second.data && r / w.tile_rows != s.tile) tile_levels(w, s.tile = r / w.tile_rows, s.levels, Gs);
  grid(w, groups_before(w, r), w.G, s.levels, Gs, s.scale, s.zero);
  for (int64_t t = t0; t < t0 + T; t++) y[t * O + r] = -zeros_dot(s.scale, s.zero, in.group_sum + t * in.sums, w.G);
  const int64_t repeat = (w.group_size + block - 1) / block;
  if (repeat == 1) return s.scale;
  for (int64_t g = 0, b = 0; g < w.G; g++)
    for (const int64_t end = b + repeat < blocks ? b + repeat : blocks; b < end; b++) s.repeated[b] = s.scale[g];
  return s.repeated;
}

// R rows, D apart, whose codes are multiplied where they stand: all weights are stored, codes have 2 to 8 bits, and
// groups are of whole blocks of columns, which have one scale.
template <int bits, int block, int T, int R>
void fused_rows(const Coded& w, const Inputs& in, int64_t first, int64_t D, int64_t t0, float* y, int64_t O, Stream* streams) {
  const int64_t blocks = (w.I + block - 1) / block;
  const __m256i shifts = shifts_8(bits);
  const uint8_t* p[R];
  const float* scales[R];
  __m256 sum[R][T];
  // Rows side by side have the same kind of grid, but each its own table.
  const Meaning meaning[2] = {Meaning(w, first), Meaning(w, first + (R - 1) * D)};
  for (int j = 0; j < R; j++) {
    const int64_t r = first + j * D;
    p[j] = w.codes + w.start[r];
    scales[j] = block_scales(w, in, r, blocks, block, t0, T, y, O, streams[j]);
    for (int t = 0; t < T; t++) sum[j][t] = _mm256_setzero_ps();
  }
  const float* x = in.x + t0 * in.stride;
  for (int64_t b = 0; b < blocks; b++, x += block) {
    __m256 part[R][T];
    for (int j = 0; j < R; j++) _mm_prefetch(reinterpret_cast<const char*>(p[j] + PREFETCH), _MM_HINT_T0);
    for (int i = 0; i < block; i += 8) {
      __m256 xs[T];
      for (int t = 0; t < T; t++) xs[t] = _mm256_loadu_ps(x + t * in.stride + i);
      for (int j = 0; j < R; j++) {
        const uint8_t* at = p[j] + i / 8 * bits;
        const __m256 q = bits == 8 ? bytes_8(at) : meaning[j](codes_8(at, bits, shifts), bits);
        for (int t = 0; t < T; t++)
          part[j][t] = i == 0 ? _mm256_mul_ps(q, xs[t]) : _mm256_fmadd_ps(q, xs[t], part[j][t]);
      }
    }
    for (int j = 0; j < R; j++) {
      p[j] += block / 8 * bits;
      const __m256 s = _mm256_set1_ps(scales[j][b]);
      for (int t = 0; t < T; t++) sum[j][t] = _mm256_fmadd_ps(part[j][t], s, sum[j][t]);
    }
  }
  for (int j = 0; j < R; j++)
    for (int t = 0; t < T; t++) {
      const int64_t r = first + j * D;
      y[(t0 + t) * O + r] += reduce_add(sum[j][t]) + some_outliers(w, r, in.x + (t0 + t) * in.stride);
    }
}

template <int bits, int block, int T>
void fused_tokens(const Coded& w, const Inputs& in, int64_t first, int64_t last, int64_t t0, float* y, int64_t O,
                  float* scratch) {
  constexpr int R = T == 1 ? ROWS : 1;
  const int64_t blocks = (w.I + block - 1) / block;
  Stream streams[R];
  for (Stream& s : streams) scratch = s.lay_out(w, blocks, scratch);
  const int64_t D = (last - first) / R;
  for (int64_t r = first; r < first + D; r++) fused_rows<bits, block, T, R>(w, in, r, D, t0, y, O, streams);
  for (int64_t r = first + R * D; r < last; r++) fused_rows<bits, block, T, 1>(w, in, r, 1, t0, y, O, streams);
}

template <int bits>
void fused(const Coded& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O, float* scratch) {
  if (w.table.data || w.group_size >= w.I || w.group_size % 64 == 0) {
    SECATEUR_BY_TOKENS((fused_tokens<bits, 64, T>(w, in, first, last, t0, y, O, scratch)))
  } else if (w.group_size % 32 == 0) {
    SECATEUR_BY_TOKENS((fused_tokens<bits, 32, T>(w, in, first, last, t0, y, O, scratch)))
  } else {
    SECATEUR_BY_TOKENS((fused_tokens<bits, 16, T>(w, in, first, last, t0, y, O, scratch)))
  }
}
