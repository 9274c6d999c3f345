// How the vector kernels go over inputs and outputs, whatever their instructions. Each includes this inside its namespace, under
// its own target, once it has the vectors V of LANES floats with `load`, `store`, `set`, `fma` (a · b + c), `fms` (a · b − c),
// `load_values` (of any dtype) and `load_bytes` (as numbers); SPLIT, the order of outputs that bfloat16 has, and `join`, which
// makes it the natural one; UNIT and ONE, as which codes are read; and readers of weights:
//
//   Values<Float>, Masked<Float>, Codes<bits>: made of a weight, an input and a first output,
//     N: the vectors of outputs that they read at a time, in their order,
//     next<end>(w, left): the next N vectors, of which nothing behind the first `left` outputs of the mask is touched,
//     at(): where the next ones lie.
//
// Eight inputs are done at a time, as many streams as a processor follows: their products go to outputs that stay in the first
// cache. What the next eight begin with is fetched meanwhile.
//
// T: tokens, C: inputs of a pass.

constexpr int PASS = 8;
// Outputs that stay in the cache.
constexpr int64_t OUTPUTS_AT_ONCE = 4096;

// Adds the products of C inputs, from the k-th that is read on; `then` is the first of the next pass.
template <class Reader, int T, int C>
inline void pass(const Columns& w, const KeptInputs& in, int64_t k, int64_t then, int64_t t0, int64_t first, int64_t last,
                 float* y, int64_t stride) {
  constexpr int N = Reader::N, STEP = N * LANES;
  Reader column[C];
  int64_t ahead[C];
  V x[C][T];
  for (int c = 0; c < C; c++) {
    column[c] = Reader(w, in.number[k + c], first);
    const int64_t next = then + c < in.K ? then + c : k + c;
    ahead[c] = Reader(w, in.number[next], first).at() - column[c].at();
    for (int t = 0; t < T; t++) x[c][t] = set(in.x[(k + c) * in.T + t0 + t]);
  }
  const auto step = [&](auto end, int64_t o) {
    V sum[T][N];
    for (int t = 0; t < T; t++)
      for (int n = 0; n < N; n++) sum[t][n] = load(y + t * stride + o + n * LANES);
    for (int c = 0; c < C; c++) {
      V weight[N];
      _mm_prefetch(reinterpret_cast<const char*>(column[c].at() + ahead[c]), _MM_HINT_T0);
      column[c].template next<decltype(end)::value>(weight, last - o);
      for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) sum[t][n] = fma(weight[n], x[c][t], sum[t][n]);
    }
    for (int t = 0; t < T; t++)
      for (int n = 0; n < N; n++) store(y + t * stride + o + n * LANES, sum[t][n]);
  };
  int64_t o = first;
  for (; o + STEP <= last; o += STEP) step(std::false_type{}, o);
  if (o < last) step(std::true_type{}, o);
}

// The products of the inputs from the k-th to before the `end`-th.
template <class Reader, int T>
inline void passes(const Columns& w, const KeptInputs& in, int64_t k, int64_t end, int64_t t0, int64_t first, int64_t last,
                   float* y, int64_t stride) {
  for (; k + PASS <= end; k += PASS) pass<Reader, T, PASS>(w, in, k, k + PASS, t0, first, last, y, stride);
  if (k + 4 <= end) {
    pass<Reader, T, 4>(w, in, k, k + 4, t0, first, last, y, stride);
    k += 4;
  }
  for (; k < end; k++) pass<Reader, T, 1>(w, in, k, k + 1, t0, first, last, y, stride);
}

template <class Reader, int T>
void values_dot(const Columns& w, const KeptInputs& in, int64_t t0, int64_t first, int64_t last, float* y, int64_t stride) {
  passes<Reader, T>(w, in, 0, in.K, t0, first, last, y, stride);
  if (Reader::ORDER == SPLIT)
    for (int t = 0; t < T; t++)
      for (int64_t o = first; o < last; o += 2 * 16) join(y + t * stride + o);
}

// Codes c are read as ONE + c / UNIT; what a group adds up to is put right, and on its scale, when it is through.
template <class Reader, int T>
void codes_dot(const Columns& w, const KeptInputs& in, int64_t t0, int64_t first, int64_t last, float* y, int64_t stride,
               float* scratch) {
  const int64_t width = round_up(last - first);
  const V unit = set(Reader::UNIT);
  for (int64_t k = 0, end; k < in.K; k = end) {
    const int64_t group = in.number[k] / w.group_size;
    float total[T] = {};
    for (end = k; end < in.K && in.number[end] < (group + 1) * w.group_size; end++)
      for (int t = 0; t < T; t++) total[t] += in.x[end * in.T + t0 + t];
    std::memset(scratch, 0, T * width * sizeof(float));
    passes<Reader, T>(w, in, k, end, t0, first, last, scratch - first, width);
    for (int64_t o = first; o < last; o += LANES) {
      const V scale = load_values(w.scale, group * w.O + o);
      const V zero = w.zero ? load_bytes(w.zero + group * w.O + o) : set(float(1 << (w.bits - 1)));
      const V lowest = fma(set(Reader::ONE), unit, zero);
      for (int t = 0; t < T; t++) {
        // With one input of 1 this is (c − zero) · scale, rounded once: that is how weights are unpacked.
        const V sum = fms(load(scratch + t * width + o - first), unit, mul(lowest, set(total[t])));
        store(y + t * stride + o, fma(sum, scale, load(y + t * stride + o)));
      }
    }
  }
}

#define SECATEUR_TOKENS(call)                    \
  for (int64_t t0 = 0; t0 < in.T; t0 += 4) {     \
    float* const out = y + t0 * stride;          \
    const int64_t left = in.T - t0;              \
    if (left >= 4) { constexpr int T = 4; call; } \
    else if (left == 3) { constexpr int T = 3; call; } \
    else if (left == 2) { constexpr int T = 2; call; } \
    else { constexpr int T = 1; call; }          \
  }

template <class Reader>
void all_values(const Columns& w, const KeptInputs& in, int64_t first, int64_t last, float* y, int64_t stride) {
  SECATEUR_TOKENS((values_dot<Reader, T>(w, in, t0, first, last, out, stride)))
}

template <int bits>
void all_codes(const Columns& w, const KeptInputs& in, int64_t first, int64_t last, float* y, int64_t stride, float* scratch) {
  SECATEUR_TOKENS((codes_dot<Codes<bits>, T>(w, in, t0, first, last, out, stride, scratch)))
}

void some_outputs(const Columns& w, const KeptInputs& in, int64_t first, int64_t last, float* y, int64_t stride, float* scratch) {
  for (int64_t t = 0; t < in.T; t++) std::memset(y + t * stride + first, 0, round_up(last - first) * sizeof(float));
  if (!w.codes) {
    switch (w.values.dtype) {
      case Float::bf16:
        return w.mask ? all_values<Masked<Float::bf16>>(w, in, first, last, y, stride) : all_values<Values<Float::bf16>>(w, in, first, last, y, stride);
      case Float::f16:
        return w.mask ? all_values<Masked<Float::f16>>(w, in, first, last, y, stride) : all_values<Values<Float::f16>>(w, in, first, last, y, stride);
      default:
        return w.mask ? all_values<Masked<Float::f32>>(w, in, first, last, y, stride) : all_values<Values<Float::f32>>(w, in, first, last, y, stride);
    }
  }
  switch (w.bits) {
    case 2:
      return all_codes<2>(w, in, first, last, y, stride, scratch);
    case 3:
      return all_codes<3>(w, in, first, last, y, stride, scratch);
    case 4:
      return all_codes<4>(w, in, first, last, y, stride, scratch);
    case 5:
      return all_codes<5>(w, in, first, last, y, stride, scratch);
    case 6:
      return all_codes<6>(w, in, first, last, y, stride, scratch);
    case 7:
      return all_codes<7>(w, in, first, last, y, stride, scratch);
    default:
      return all_codes<8>(w, in, first, last, y, stride, scratch);
  }
}

void dot(const Columns& w, const KeptInputs& in, int64_t first, int64_t last, float* y, int64_t stride, float* scratch) {
  for (int64_t o = first; o < last; o += OUTPUTS_AT_ONCE)
    some_outputs(w, in, o, o + OUTPUTS_AT_ONCE < last ? o + OUTPUTS_AT_ONCE : last, y, stride, scratch);
}
