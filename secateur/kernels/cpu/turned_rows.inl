// Rows with groups of 16 weights, whose codes have two to four bits, with inputs that are turned to match (see `turn`): a lane for
// each group, so that one scale and one zero point a lane are all that a vector of groups needs.
//
// How the vector kernels go over such rows, whatever their instructions. Each includes this inside its namespace, under its own
// target, once it has `tile_levels`, and goes on to define `turned_rows`.

// A group's codes are 16 · bits of the stream. Each lane is given the four bytes that its group's first codes lie in, then those of
// the others: how many codes lie in the first of these words, and the bit that the second begins at.
template <int bits>
constexpr int IN_FIRST = bits == 2 ? 16 : bits == 3 ? 10 : 8;
template <int bits>
constexpr int SECOND_AT = IN_FIRST<bits> * bits / 8 * 8;

// R rows, one after the other, that have their second level in common, which `levels` are.
template <int bits, int T, int R>
void turned_rows(const Coded& w, const Inputs& in, int64_t row, int64_t t0, const float* levels, float* y, int64_t O);

// What the next rows will want is fetched while these are multiplied. Inlined whatever happens: a function that only fetches has no
// effect in the eyes of gcc, which leaves its calls out.
[[gnu::always_inline]] inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Scales and zero points of the group of this number.
[[gnu::always_inline]] inline void fetch_grid(const Coded& w, int64_t at) {
  if (!w.scale.data) return fetch(w.pair + (w.nibbles ? at : 2 * at));
  fetch(static_cast<const char*>(w.scale.data) + (w.scale.dtype == Float::f32 ? 4 : 2) * at);
  if (w.zero) fetch(w.zero + at);
}

// Of some rows, which need them last of all.
[[gnu::always_inline]] inline void fetch_outliers(const Coded& w, int64_t first, int64_t last) {
  if (!w.outlier_start) return;
  for (int64_t n = w.outlier_start[first]; n < w.outlier_start[last]; n += 16) {
    fetch(w.outlier_column + n);
    fetch(static_cast<const char*>(w.outlier_value.data) + (w.outlier_value.dtype == Float::f32 ? 4 : 2) * n);
  }
}

template <int bits, int T>
void turned_tokens(const Coded& w, const Inputs& in, int64_t first, int64_t last, int64_t t0, float* y, int64_t O, float* levels) {
  constexpr int R = T == 1 ? MOST_ROWS : 2;
  for (int64_t r = first; r < last;) {
    int64_t end = last;
    if (w.second.data) {
      const int64_t tile = r / w.tile_rows;
      tile_levels(w, tile, levels, round_up(w.G + WIDTH));
      end = std::min(last, (tile + 1) * w.tile_rows);
    }
    for (; r + R <= end; r += R) turned_rows<bits, T, R>(w, in, r, t0, levels, y, O);
    for (; r < end; r++) turned_rows<bits, T, 1>(w, in, r, t0, levels, y, O);
  }
}

template <int bits>
void turned_dot(const Coded& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O, float* levels) {
  SECATEUR_BY_TOKENS((turned_tokens<bits, T>(w, in, first, last, t0, y, O, levels)))
}

// Whether `turned_dot` takes the weight; the inputs are turned for any with such groups.
inline bool turned_takes(const Coded& w, const Inputs& in) { return in.x_turned && !w.mask && w.bits >= 2 && w.bits <= 4; }

void any_turned_dot(const Coded& w, const Inputs& in, int64_t first, int64_t last, float* y, int64_t O, float* levels) {
  if (w.bits == 2) return turned_dot<2>(w, in, first, last, y, O, levels);
  if (w.bits == 3) return turned_dot<3>(w, in, first, last, y, O, levels);
  return turned_dot<4>(w, in, first, last, y, O, levels);
}
