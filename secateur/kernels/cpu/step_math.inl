// What a decoder layer does between its products: plain loops that the compiler makes vectors of, for whichever instructions it may
// use where this is included. Nothing of std is called that could be compiled for one of them and used by all. Sums are of LANES parts each, side by side.

constexpr int LANES = 16;

// The sum of LANES parts.
inline float whole(const float* parts) {
  float eight[8], four[4];
  for (int j = 0; j < 8; j++) eight[j] = parts[j] + parts[j + 8];
  for (int j = 0; j < 4; j++) four[j] = eight[j] + eight[j + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x to some 1e-7 of it, by a polynomial of the fraction of x/ln 2 (that of the Cephes library).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2²³, which leaves no fraction
  const float n = shifted - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

struct AsFloat {
  static float of(float v) { return v; }
};
struct AsBf16 {
  static float of(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};
struct AsF16 {
  static float of(uint16_t v) { return from_f16(v); }
};

// Calls `body` with the values and how one of them becomes a float.
template <class Body>
inline void with_floats(Floats v, const Body& body) {
  if (v.dtype == Float::f32) body(static_cast<const float*>(v.data), AsFloat());
  else if (v.dtype == Float::bf16) body(static_cast<const uint16_t*>(v.data), AsBf16());
  else body(static_cast<const uint16_t*>(v.data), AsF16());
}

// The products of R rows, `distance` apart, with T tokens, whose inputs are `stride` apart, and outputs O.
template <int R, int T, class W, class As>
inline void dense_rows(const W* w, int64_t distance, int64_t I, const float* x, int64_t stride, float* y, int64_t step, int64_t O, As) {
  float sum[R][T][LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= I; i += LANES)
    for (int r = 0; r < R; r++) {
      float weight[LANES];
      for (int j = 0; j < LANES; j++) weight[j] = As::of(w[r * distance + i + j]);
      for (int t = 0; t < T; t++)
        for (int j = 0; j < LANES; j++) sum[r][t][j] += weight[j] * x[t * stride + i + j];
    }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      for (int64_t k = i; k < I; k++) sum[r][t][0] += As::of(w[r * distance + k]) * x[t * stride + k];
      y[t * O + r * step] = whole(sum[r][t]);
    }
}

template <int T, class W, class As>
inline void dense_tokens(const W* w, int64_t I, int64_t first, int64_t last, const float* x, int64_t stride, float* y, int64_t O, As as) {
  // Rows side by side lie far from each other, as other kernels have them.
  constexpr int R = T == 1 ? 4 : 1;
  const int64_t D = (last - first) / R;
  for (int64_t r = first; r < first + D; r++) dense_rows<R, T>(w + r * I, D * I, I, x, stride, y + r, D, O, as);
  for (int64_t r = first + R * D; r < last; r++) dense_rows<1, T>(w + r * I, 0, I, x, stride, y + r, 0, O, as);
}

void dense_dot(const Dense& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O) {
  with_floats(w.values, [&](const auto* values, auto as) {
    SECATEUR_BY_TOKENS((dense_tokens<T>(values, w.I, first, last, in.x + t0 * in.stride, in.stride, y + t0 * O, O, as)))
  });
}

void rms_norm(const float* x, Floats weight, int64_t n, float eps, float* y) {
  float squares[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) squares[j] += x[i + j] * x[i + j];
  for (; i < n; i++) squares[0] += x[i] * x[i];
  const float length = 1 / sqrtf(whole(squares) / float(n) + eps);
  with_floats(weight, [&](const auto* scale, auto as) {
    for (int64_t k = 0; k < n; k++) y[k] = x[k] * length * as.of(scale[k]);
  });
}

void turn(float* head, const float* cos, const float* sin, int64_t D) {
  float* const high = head + D / 2;
  for (int64_t i = 0; i < D / 2; i++) {
    const float a = head[i], b = high[i];
    head[i] = a * cos[i] - b * sin[i];
    high[i] = b * cos[i + D / 2] + a * sin[i + D / 2];
  }
}

// y = Σ share · value, for N of D features.
template <int N, class V, class As>
inline void mix(const float* shares, int64_t S, const V* values, int64_t D, float* y, As) {
  float sum[N] = {};
  for (int64_t s = 0; s < S; s++)
    for (int j = 0; j < N; j++) sum[j] += shares[s] * As::of(values[s * D + j]);
  for (int j = 0; j < N; j++) y[j] = sum[j];
}

void attend(const Head& h, float* scores, float* y) {
  with_floats(h.keys, [&](const auto* keys, auto as) {
    int64_t s = 0;
    for (; s + 4 <= h.S; s += 4) dense_rows<4, 1>(keys + s * h.D, h.D, h.D, h.query, 0, scores + s, 1, 0, as);
    for (; s < h.S; s++) dense_rows<1, 1>(keys + s * h.D, 0, h.D, h.query, 0, scores + s, 0, 0, as);
  });
  const float hidden = -INFINITY;
  if (h.seen)
    for (int64_t s = 0; s < h.S; s++) scores[s] = h.seen[s] ? scores[s] : hidden;
  // What lies behind the last is hidden, too.
  const int64_t end = (h.S + LANES - 1) / LANES * LANES;
  for (int64_t s = h.S; s < end; s++) scores[s] = hidden;
  float mosts[LANES], sums[LANES] = {}, most = hidden;
  for (int j = 0; j < LANES; j++) mosts[j] = hidden;
  for (int64_t s = 0; s < end; s += LANES)
    for (int j = 0; j < LANES; j++) mosts[j] = scores[s + j] > mosts[j] ? scores[s + j] : mosts[j];
  for (int j = 0; j < LANES; j++) most = mosts[j] > most ? mosts[j] : most;
  for (int64_t s = 0; s < end; s += LANES)
    for (int j = 0; j < LANES; j++) {
      const float share = exponential(scores[s + j] - most);
      scores[s + j] = scores[s + j] == hidden ? 0.0f : share;
      sums[j] += scores[s + j];
    }
  const float sum = whole(sums);
  for (int64_t s = 0; s < h.S; s++) scores[s] = sum == 0 ? 0.0f : scores[s] / sum;
  with_floats(h.values, [&](const auto* values, auto as) {
    int64_t d = 0;
    for (; d + 64 <= h.D; d += 64) mix<64>(scores, h.S, values + d, h.D, y + d, as);
    for (; d + LANES <= h.D; d += LANES) mix<LANES>(scores, h.S, values + d, h.D, y + d, as);
    for (; d < h.D; d++) mix<1>(scores, h.S, values + d, h.D, y + d, as);
  });
}

void gated(const float* gate, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

void group_sums(const float* x, int64_t I, int64_t group_size, int64_t G, float* sums) {
  for (int64_t g = 0; g < G; g++) {
    float parts[LANES] = {};
    const int64_t end = (g + 1) * group_size < I ? (g + 1) * group_size : I;
    int64_t i = g * group_size;
    for (; i + LANES <= end; i += LANES)
      for (int j = 0; j < LANES; j++) parts[j] += x[i + j];
    for (; i < end; i++) parts[0] += x[i];
    sums[g] = whole(parts);
  }
  for (int64_t g = G; g < round_up(G); g++) sums[g] = 0;
}

void split(const float* x, int64_t stride, float* to) {
  for (int64_t i = 0; i < stride; i += 32)
    for (int j = 0; j < 16; j++) {
      to[i + j] = x[i + 2 * j];
      to[i + 16 + j] = x[i + 2 * j + 1];
    }
}

const StepKernels step_kernels = {dense_dot, rms_norm, turn, attend, gated, group_sums, split};
