// Products of many tokens with rows that were unpacked to bfloat16, where the processor has instructions for that. Sums are
// float32.
//
// I: input features, T: tokens.

#pragma once

#include <cstdint>

namespace secateur {

// Tokens lie in groups of so many, and columns in steps of so many, with zeros where there are no more.
constexpr int64_t GROUP = 16, STEP = 32;
// Rows are multiplied so many at a time, at most, and so many columns. What is unpacked of rows lies a bit further apart, so that
// they are not all of the same few lines of the first-level cache; and always as far, so that no product needs a register a row.
constexpr int64_t ROWS_AT_ONCE = 32, MOST_COLUMNS = 8192, ROW_STRIDE = MOST_COLUMNS + 32;

// Some columns of some rows, and the same columns of some groups of tokens.
struct Block {
  const uint16_t* w;   // [rows, ROW_STRIDE], of which `depth` columns
  int64_t rows;        // GROUP or ROWS_AT_ONCE
  const uint16_t* x;   // [groups, depth / 2, GROUP, 2], each group `apart` values after the one before
  int64_t apart;
  int64_t groups;
  int64_t depth;       // a multiple of STEP
  float* y;            // [rows, y_stride]
  int64_t y_stride;
  bool more;           // added to what is in y; otherwise put there
};

struct Products {
  const char* name;
  // A group of inputs, the first `tokens` of x [tokens, I], as a block wants it; with zeros up to `depth`.
  void (*lay)(const uint16_t* x, int64_t tokens, int64_t I, int64_t depth, uint16_t* to);
  void (*multiply)(const Block& block);
  // y [rows, y_stride] to columns of out [tokens, O], with bias [rows] or null; as bfloat16, or as they are.
  void (*finish)(const float* y, int64_t y_stride, int64_t rows, int64_t tokens, const float* bias, uint16_t* out, int64_t O);
  void (*finish_floats)(const float* y, int64_t y_stride, int64_t rows, int64_t tokens, const float* bias, float* out, int64_t O);
  // GROUP columns of x [tokens, I] as inputs of a block, tokens being what is summed over; with zeros up to `depth`.
  void (*lay_columns)(const uint16_t* x, int64_t tokens, int64_t I, int64_t depth, uint16_t* to);
  // The same columns as rows of a block, from what `lay_columns` made of them.
  void (*columns_as_rows)(const uint16_t* laid, int64_t depth, uint16_t* to);
};

// Null where they were not compiled, or this processor cannot run them.
const Products* bf16_products();
const Products* amx_products();

}  // namespace secateur
