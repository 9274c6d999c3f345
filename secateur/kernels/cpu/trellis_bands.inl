// How the vector kernels for trellis codes go over rings, tokens and blocks of Hadamard transforms, whatever their
// instructions. Each includes this inside its namespace, under its own target, once it has LANES, MOST_BLOCKS, and
//
//   Vector load(Floats, int64_t at), load(const float*); void store(float*, Vector); Vector within(Vector)
//       the values from `at` on as floats; the Hadamard transform of the lanes of one vector
//   constexpr bool CENTRED              whether weights are decoded with their middle at zero, or at MIDDLE
//   template <int K, int N, int T>
//   void sum_blocks(const Trellis&, const Rings&, const float* x, int64_t x_stride, float* y, int64_t stride)
//       adds up the weights of N blocks, from rings.block on, times the inputs of T tokens; y holds what there was before
//   template <int K> void expand_block(const Trellis&, const uint8_t* ring, int64_t block, void* to, bool bf16)

template <int K, int T, int N>
void dot_blocks(const Trellis& w, Rings rings, const float* x, int64_t x_stride, float* y, int64_t stride) {
  const int64_t blocks = w.ring / BLOCK;
  for (; rings.block + N <= blocks; rings.block += N)
    sum_blocks<K, N, T>(w, rings, x, x_stride, y + rings.block * BLOCK, stride);
  if constexpr (N > 1) dot_blocks<K, T, N / 2>(w, rings, x, x_stride, y, stride);
}

template <int K>
void dot_band(const Trellis& w, const Inputs& in, int64_t band, int64_t first, int64_t last, float* y, int64_t stride) {
  for (int64_t t = 0; t < in.T; t++) std::fill_n(y + t * stride, w.ring, 0.0f);
  for (int64_t i = first; i < last; i += INPUTS_AT_ONCE) {
    if constexpr (!CENTRED)  // here and not once at the end, so that no sum is far from zero
      for (int64_t t = 0; t < in.T; t++) {
        const float middle = float(MIDDLE) * in.group_sum[t * in.sums + i / INPUTS_AT_ONCE];
        for (int64_t o = 0; o < w.ring; o++) y[t * stride + o] -= middle;
      }
    const Rings rings = {ring_at(w, band, i), std::min(INPUTS_AT_ONCE, last - i)};
    SECATEUR_BY_TOKENS((dot_blocks<K, T, MOST_BLOCKS / T>(w, rings, in.x + t0 * in.stride + i, in.stride, y + t0 * stride, stride)))
  }
}

void trellis_dot(const Trellis& w, const Inputs& in, int64_t band, int64_t first, int64_t last, float* y, int64_t stride) {
  if (w.ring % BLOCK)
    plain_trellis_dot(w, in, band, first, last, y, stride);
  else if (w.bits == 2)
    dot_band<2>(w, in, band, first, last, y, stride);
  else if (w.bits == 3)
    dot_band<3>(w, in, band, first, last, y, stride);
  else
    dot_band<4>(w, in, band, first, last, y, stride);
}

template <int K>
void expand_band(const Trellis& w, int64_t band, int64_t first, int64_t last, void* to, int64_t stride, bool bf16) {
  for (int64_t i = first; i < last; i++)
    for (int64_t block = 0; block < w.ring / BLOCK; block++) {
      const int64_t at = (i - first) * stride + block * BLOCK;
      expand_block<K>(w, ring_at(w, band, i), block, static_cast<uint8_t*>(to) + at * (bf16 ? 2 : 4), bf16);
    }
}

void trellis_expand(const Trellis& w, int64_t band, int64_t first, int64_t last, void* to, int64_t stride, bool bf16) {
  if (w.ring % BLOCK)
    plain_trellis_expand(w, band, first, last, to, stride, bf16);
  else if (w.bits == 2)
    expand_band<2>(w, band, first, last, to, stride, bf16);
  else if (w.bits == 3)
    expand_band<3>(w, band, first, last, to, stride, bf16);
  else
    expand_band<4>(w, band, first, last, to, stride, bf16);
}

void hadamard(float* x, int64_t n, int64_t block) {
  if (block < LANES) return plain_hadamard(x, n, block);
  for (int64_t i = 0; i < n; i += LANES) store(x + i, within(load(x + i)));
  for (int64_t h = LANES; h < block; h *= 2)
    for (int64_t b = 0; b < n; b += 2 * h)
      for (int64_t i = b; i < b + h; i += LANES) {
        const Vector low = load(x + i), high = load(x + i + h);
        store(x + i, low + high);
        store(x + i + h, low - high);
      }
}

void rotate_in(Floats x, int64_t at, Floats scale, int64_t n, int64_t block, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(x, at + i) * load(scale, i));
  for (; i < n; i++) to[i] = value_at(x, at + i) * value_at(scale, i);
  hadamard(to, n, block);
}

void rotate_out(float* row, Floats scale, float factor, int64_t n, int64_t block) {
  hadamard(row, n, block);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(row + i, load(row + i) * (load(scale, i) * factor));
  for (; i < n; i++) row[i] *= value_at(scale, i) * factor;
}
