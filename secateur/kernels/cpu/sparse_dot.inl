// How the vector kernels go over rows and tokens, whatever their instructions. Each includes this inside its namespace, under
// its own target, once it has
//
//   template <Kind kind, int T, int R>
//   void sparse_rows(const Sparse&, const Inputs&, int64_t first, int64_t D, int64_t t0, float* y, int64_t O);
//
// which does R rows, D apart.

template <Kind kind, int T>
void sparse_tokens(const Sparse& w, const Inputs& in, int64_t first, int64_t last, int64_t t0, float* y, int64_t O) {
  constexpr int R = T == 1 ? MOST_ROWS : 1;
  const int64_t D = (last - first) / R;
  for (int64_t r = first; r < first + D; r++) sparse_rows<kind, T, R>(w, in, r, D, t0, y, O);
  for (int64_t r = first + R * D; r < last; r++) sparse_rows<kind, T, 1>(w, in, r, 1, t0, y, O);
}

void sparse_dot(const Sparse& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O) {
  if (w.values.dtype == Float::f32) {
    SECATEUR_BY_TOKENS((sparse_tokens<Kind::f32, T>(w, in, first, last, t0, y, O)))
  } else if (w.values.dtype == Float::f16) {
    SECATEUR_BY_TOKENS((sparse_tokens<Kind::f16, T>(w, in, first, last, t0, y, O)))
  } else {
    SECATEUR_BY_TOKENS((sparse_tokens<Kind::bf16, T>(w, in, first, last, t0, y, O)))
  }
}
