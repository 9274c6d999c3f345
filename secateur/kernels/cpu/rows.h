// What the operators hand to the kernels, and the table of kernels that each instruction set has.
//
// O: output features, I: input features, K: stored weights of a row, G: groups of a row, T: tokens.

#pragma once

#include <cstdint>

namespace secateur {

enum class Float : int { f32, bf16, f16 };

// A vector of floating values; `data` is null where a weight has none.
struct Floats {
  const void* data = nullptr;
  Float dtype = Float::f32;
};

// Wide loads may begin at any value or code, so 64 bytes, whatever they are, follow the last; and inputs are as long as WIDTH demands.
constexpr int64_t WIDTH = 64;
constexpr int64_t round_up(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// Values under a bit mask.
struct Sparse {
  int64_t I;
  Floats values;
  const uint8_t* mask;   // [O, ⌈I/8⌉]
  const int64_t* start;  // [O + 1]
};

// Codes, and what they stand for. Pointers to what a weight does not have are null.
struct Coded {
  int64_t I;
  int bits;
  const uint8_t* codes;
  const int64_t* start;        // [O + 1], bytes
  const int32_t* count;        // [O], stored weights; null: I
  const int64_t* group_start;  // [O + 1]; null: r · G
  int64_t group_size;          // at most I
  int64_t G;                   // ⌈I / group_size⌉; 0 for a table
  // One of three grids: scale and zero,
  Floats scale;
  const uint8_t* zero;  // null: `level`, or where that is null too 2^(bits − 1)
  Floats level;         // zero points that are between codes, or beyond them
  // codes of scale and zero and the second level,
  const uint8_t* pair;
  bool nibbles;
  Floats second;  // [tiles, second_groups, 4]
  int64_t second_groups;
  int64_t tile_rows;
  // or a table.
  Floats table;  // [O, 2^bits]
  const uint8_t* mask;  // [O, ⌈I/8⌉], of stored columns
  const int32_t* outlier_start;  // [O + 1]
  const int32_t* outlier_column;
  Floats outlier_value;
};

// The inputs of T tokens, columns in stored order, with zeros after the last column up to `stride`, a multiple of WIDTH.
struct Inputs {
  int64_t T;
  int64_t stride;
  const float* x;              // [T, stride]
  const float* x_split;        // of every 32 columns the even ones before the odd ones, for AVX-512; null unless values are bfloat16
  const float* group_sum;      // [T, sums]: of each group; null where there are no groups
  int64_t sums;                // a multiple of WIDTH
  const float* x_turned;       // [T, turned], see `turn`; null unless groups are of TURNED columns
  int64_t turned;
};

// Groups of so many columns are multiplied as many at a time, a lane each.
constexpr int64_t TURNED = 16;
constexpr int64_t turned_floats(int64_t G) { return (G + TURNED - 1) / TURNED * TURNED * TURNED; }

// Of each TURNED groups the first column of all, then the second, and so on; with zeros for what is beyond the last of I columns.
inline void turn(const float* x, int64_t I, int64_t G, float* to) {
  for (int64_t k = 0; k < turned_floats(G); k++) {
    const int64_t within = k % (TURNED * TURNED), i = k - within + within % TURNED * TURNED + within / TURNED;
    to[k] = i < I ? x[i] : 0;
  }
}

// Rows that a kernel does side by side, at most.
constexpr int MOST_ROWS = 4;

// Floats of scratch that a kernel wants for a weight of these sizes: rows, and for each row done at a time six of groups.
constexpr int64_t scratch_floats(int64_t I, int64_t G) { return 3 * round_up(I) + MOST_ROWS * 6 * round_up(G + WIDTH); }

struct TrellisKernels;
struct ColumnKernels;
struct StepKernels;

// Kernels for the rows from `first` to before `last`. `y` is [T, O], of which these columns are set.
struct Kernels {
  const char* name;
  void (*sparse_dot)(const Sparse&, const Inputs&, int64_t first, int64_t last, float* y, int64_t O);
  // One row, dense, columns in stored order; `w` has room for round_up(I).
  void (*sparse_row)(const Sparse&, int64_t r, float* w);
  void (*coded_dot)(const Coded&, const Inputs&, int64_t first, int64_t last, float* y, int64_t O, float* scratch);
  void (*coded_row)(const Coded&, int64_t r, float* w, float* scratch);
  // float32 to bfloat16, to the nearest and ties to even. Both vectors have room for round_up(n).
  void (*to_bf16)(const float* from, uint16_t* to, int64_t n);
  const TrellisKernels* trellis;
  const ColumnKernels* columns;
  const StepKernels* step;
  // Columns from k0, a multiple of 64, to before k1, a multiple of 32, of the rows from `first` to before `last`, as bfloat16, each
  // `stride` values after the one before, which is 32 more than columns at least; with zeros after the last column. Null where
  // there are no such kernels. Values are bfloat16 themselves; `at` is where the row's next ones begin, and is kept from call to call.
  void (*sparse_bf16)(const Sparse&, int64_t first, int64_t last, int64_t k0, int64_t k1, int64_t* at, uint16_t* to, int64_t stride) = nullptr;
  // `coded_bf16` is for those weights alone that `coded_bf16_takes`.
  bool (*coded_bf16_takes)(const Coded&) = nullptr;
  void (*coded_bf16)(const Coded&, int64_t first, int64_t last, int64_t k0, int64_t k1, uint16_t* to, int64_t stride, float* scratch) = nullptr;
};

extern const Kernels plain_kernels;
// Null where they were not compiled, or this processor cannot run them.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
// AVX2, and AVX-512 where it does without VBMI.
const Kernels* vnni_kernels();

}  // namespace secateur
