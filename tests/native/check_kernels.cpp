// Runs all kernels on random weights whose buffers are exactly as long as rows.h promises, and compares them with the plain
// ones. Built with sanitizers, it stops at the first byte that is read or written beyond a buffer.
//
// usage: check_kernels [unpadded]    "unpadded" leaves out what has to follow values and codes: that must be found.

#include "check_columns.h"
#include "check_step.h"
#include "products.h"
#include "random_memory.h"

using namespace secateur;

namespace {

// `largest`: of the terms that are added up for one column of a row, per unit of input.
void compare_dot(const float* y, const float* want, const Inputs& in, int64_t first, int64_t last, int64_t O, float largest,
                 const Kernels& kernels, int64_t number) {
  for (int64_t t = 0; t < in.T; t++) {
    float size = 0;
    for (int64_t i = 0; i < in.stride; i++) size += std::fabs(in.x[t * in.stride + i]);
    for (int64_t r = 0; r < O; r++) {
      const bool asked = r >= first && r < last;
      // What was not asked for is left alone.
      if (asked ? !(std::fabs(y[t * O + r] - want[t * O + r]) <= 1e-5f * size * largest) : y[t * O + r] != 0)
        fail("dot", kernels, number);
    }
  }
}

void compare_row(const float* row, const float* want, int64_t I, float tolerance, const Kernels& kernels, int64_t number) {
  for (int64_t i = 0; i < I; i++)
    if (!(std::fabs(row[i] - want[i]) <= tolerance)) fail("row", kernels, number);
}

// Columns of rows as bfloat16, by a kernel that gives some of them, are those of float32 rows, rounded.
template <class Unpack>
void compare_bf16(const std::vector<std::vector<float>>& rows, int64_t I, const Unpack& unpack, const Kernels& kernels, int64_t number) {
  const int64_t O = int64_t(rows.size()), end = (I + 31) / 32 * 32, step = one_of<int64_t>({64, 128, 1024});
  for (int64_t k0 = 0; k0 < end; k0 += step) {
    const int64_t k1 = std::min(k0 + step, end), stride = k1 - k0 + 32;
    Memory memory;
    uint16_t* const to = memory.exactly(std::vector<uint16_t>(O * stride));
    unpack(k0, k1, to, stride);
    for (int64_t r = 0; r < O; r++)
      for (int64_t k = k0; k < k1; k++)
        if (to[r * stride + k - k0] != (k < I ? to_bf16(rows[r][k]) : 0)) fail("bfloat16 row", kernels, number);
  }
}

int64_t random_columns() { return one_of<int64_t>({1, 7, 8, 9, 31, 33, 63, 64, 65, 100, 128, 200, 333}); }

void check_sparse(const std::vector<const Kernels*>& all, int64_t number) {
  Memory memory;
  const int64_t O = 1 + below(6), I = random_columns(), T = below(9), first = below(O), last = first + 1 + below(O - first);
  std::vector<int64_t> count;
  Sparse w = {};
  w.I = I;
  w.mask = memory.exactly(random_mask(O, I, count));
  w.start = memory.exactly(running_sum<int64_t>(count));
  w.values = memory.values(w.start[O], one_of<Float>({Float::f32, Float::bf16, Float::f16}), true, padding);
  const Inputs in = random_inputs(memory, T, I, 1, 0, w.values.dtype == Float::bf16);
  float *want = memory.floats(T * O), *want_row = memory.floats(round_up(I));
  plain_kernels.sparse_dot(w, in, first, last, want, O);
  for (const Kernels* kernels : all) {
    float *y = memory.floats(T * O), *row = memory.floats(round_up(I));
    kernels->sparse_dot(w, in, first, last, y, O);
    compare_dot(y, want, in, first, last, O, 8, *kernels, number);
    for (int64_t r = 0; r < O; r++) {
      plain_kernels.sparse_row(w, r, want_row);
      kernels->sparse_row(w, r, row);
      compare_row(row, want_row, I, 0, *kernels, number);
    }
    if (!kernels->sparse_bf16 || w.values.dtype != Float::bf16) continue;
    std::vector<std::vector<float>> rows(O, std::vector<float>(round_up(I)));
    for (int64_t r = 0; r < O; r++) plain_kernels.sparse_row(w, r, rows[r].data());
    std::vector<int64_t> at(O);
    compare_bf16(rows, I, [&](int64_t k0, int64_t k1, uint16_t* to, int64_t stride) {
      kernels->sparse_bf16(w, 0, O, k0, k1, at.data(), to, stride);
    }, *kernels, number);
  }
}

void check_coded(const std::vector<const Kernels*>& all, int64_t number) {
  Memory memory;
  const int64_t O = 1 + below(6), I = random_columns(), T = below(9), first = below(O), last = first + 1 + below(O - first);
  const Float half = one_of<Float>({Float::bf16, Float::f16});
  Coded w = {};
  w.I = I;
  w.bits = int(1 + below(8));
  // Which weights are stored.
  std::vector<int64_t> K(O, I), bytes(O), groups(O);
  if (chance(0.4)) {
    w.mask = memory.exactly(random_mask(O, I, K));
    w.count = memory.exactly(std::vector<int32_t>(K.begin(), K.end()));
  }
  for (int64_t r = 0; r < O; r++) bytes[r] = (K[r] * w.bits + 7) / 8;
  w.start = memory.exactly(running_sum<int64_t>(bytes));
  w.codes = memory.exactly(random_bytes(w.start[O]), padding);
  // What codes stand for, and the largest of the terms that make a weight.
  float largest = 16;
  const int64_t kind = below(3);
  if (kind == 0) {
    w.table = memory.values(O << w.bits, half, true);
  } else {
    w.group_size = std::min<int64_t>(I, one_of<int64_t>({1, 3, 16, 16, 16, 32, 48, 64, 96, 128, 1000}));
    w.G = (I + w.group_size - 1) / w.group_size;
    for (int64_t r = 0; r < O; r++) groups[r] = (K[r] + w.group_size - 1) / w.group_size;
    const std::vector<int64_t> group_start = running_sum<int64_t>(groups);
    if (w.mask) w.group_start = memory.exactly(group_start);
    const int64_t total = group_start[O];
    if (kind == 1) {
      w.scale = memory.values(total, half, false);
      if (chance(0.4))
        w.zero = memory.exactly(random_bytes(total));
      else if (chance(0.3))
        w.level = memory.values(total, Float::f32, false);
      largest = 8 * 512 + 16;
    } else {
      w.nibbles = chance(0.5);
      w.pair = memory.exactly(random_bytes(w.nibbles ? total : 2 * total));
      w.tile_rows = 1 + below(4);
      w.second_groups = *std::max_element(groups.begin(), groups.end());
      w.second = memory.values((O + w.tile_rows - 1) / w.tile_rows * w.second_groups * 4, half, false);
      const float most = 8 + 8 * (w.nibbles ? 15 : 255);
      largest = most * (256 + most) + 16;
    }
  }
  if (chance(0.5)) {
    std::vector<int64_t> count(O);
    std::vector<int32_t> column;
    for (int64_t& n : count) {
      n = chance(0.3) ? 0 : below(I + 1);
      for (int64_t i = 0; i < n; i++) column.push_back(int32_t(below(I)));
    }
    w.outlier_start = memory.exactly(running_sum<int32_t>(count));
    w.outlier_column = memory.exactly(column);
    w.outlier_value = memory.values(int64_t(column.size()), half, true);
    largest += 8 * float(I);  // some may be of one column
  }
  const Inputs in = random_inputs(memory, T, I, std::max<int64_t>(1, w.group_size), w.G, false);
  const int64_t scratch = scratch_floats(I, w.G);
  float *want = memory.floats(T * O), *want_row = memory.floats(round_up(I));
  plain_kernels.coded_dot(w, in, first, last, want, O, memory.floats(scratch));
  for (const Kernels* kernels : all) {
    float *y = memory.floats(T * O), *row = memory.floats(round_up(I));
    kernels->coded_dot(w, in, first, last, y, O, memory.floats(scratch));
    compare_dot(y, want, in, first, last, O, largest, *kernels, number);
    for (int64_t r = 0; r < O; r++) {
      plain_kernels.coded_row(w, r, want_row, memory.floats(scratch));
      kernels->coded_row(w, r, row, memory.floats(scratch));
      compare_row(row, want_row, I, 1e-5f * largest, *kernels, number);
    }
    if (!kernels->coded_bf16 || !kernels->coded_bf16_takes(w)) continue;
    std::vector<std::vector<float>> rows(O, std::vector<float>(round_up(I)));
    for (int64_t r = 0; r < O; r++) kernels->coded_row(w, r, rows[r].data(), memory.floats(scratch));
    compare_bf16(rows, I, [&](int64_t k0, int64_t k1, uint16_t* to, int64_t stride) {
      kernels->coded_bf16(w, 0, O, k0, k1, to, stride, memory.floats(scratch));
    }, *kernels, number);
  }
}

// Many tokens: laid out, multiplied in two pieces of columns, and turned back.
void check_products(const Products& products, int64_t number) {
  Memory memory;
  const int64_t O = 1 + below(ROWS_AT_ONCE), I = random_columns(), T = 1 + below(100), groups = (T + GROUP - 1) / GROUP;
  const int64_t depth = (I + STEP - 1) / STEP * STEP, rows = (O + GROUP - 1) / GROUP * GROUP;
  const int64_t columns = STEP * (1 + below(depth / STEP)), y_stride = groups * GROUP + below(2) * GROUP;
  const uint16_t* const x = static_cast<const uint16_t*>(memory.values(T * I, Float::bf16, true).data);
  std::vector<uint16_t> w((rows - 1) * ROW_STRIDE + depth);
  for (int64_t r = 0; r < O; r++)
    for (int64_t i = 0; i < I; i++) w[r * ROW_STRIDE + i] = to_bf16(float(int(below(512)) - 256) / 64);
  const uint16_t* const weights = memory.exactly(w);
  uint16_t* const laid = memory.exactly(std::vector<uint16_t>(groups * GROUP * depth));
  for (int64_t g = 0; g < groups; g++)
    products.lay(x + g * GROUP * I, std::min(GROUP, T - g * GROUP), I, depth, laid + g * GROUP * depth);
  float* const y = memory.floats(rows * y_stride);
  for (int64_t k0 = 0; k0 < depth; k0 += columns)
    products.multiply({weights + k0, rows, laid + k0 * GROUP, GROUP * depth, groups, std::min(columns, depth - k0), y, y_stride, k0 > 0});
  const float* const bias = chance(0.5) ? static_cast<const float*>(memory.values(O, Float::f32, true).data) : nullptr;
  uint16_t* const out = memory.exactly(std::vector<uint16_t>(T * O));
  float* const sums = memory.floats(T * O);
  products.finish(y, y_stride, O, T, bias, out, O);
  products.finish_floats(y, y_stride, O, T, bias, sums, O);
  for (int64_t t = 0; t < T; t++)
    for (int64_t r = 0; r < O; r++) {
      double sum = bias ? bias[r] : 0, size = std::fabs(sum);
      for (int64_t i = 0; i < I; i++) {
        const double product = double(from_bits(uint32_t(x[t * I + i]) << 16)) * from_bits(uint32_t(w[r * ROW_STRIDE + i]) << 16);
        sum += product;
        size += std::fabs(product);
      }
      const double got = from_bits(uint32_t(out[t * O + r]) << 16);
      if (!(std::fabs(got - sum) <= std::fabs(sum) / 256 + 1e-5 * size && std::fabs(sums[t * O + r] - sum) <= 1e-5 * size)) {
        std::printf("products of %s are wrong at %ld\n", products.name, long(number));
        std::exit(1);
      }
    }
}

// Columns laid out as inputs and as rows are those of the tokens, with zeros behind the last.
void check_columns_laid(const Products& products, int64_t number) {
  Memory memory;
  const int64_t T = 1 + below(100), I = GROUP * (1 + below(4)), depth = (T + STEP - 1) / STEP * STEP, first = GROUP * below(I / GROUP);
  const uint16_t* const x = static_cast<const uint16_t*>(memory.values(T * I, Float::bf16, true).data);
  uint16_t* const laid = memory.exactly(std::vector<uint16_t>(GROUP * depth));
  uint16_t* const rows = memory.exactly(std::vector<uint16_t>((GROUP - 1) * ROW_STRIDE + depth));
  products.lay_columns(x + first, T, I, depth, laid);
  products.columns_as_rows(laid, depth, rows);
  for (int64_t t = 0; t < depth; t++)
    for (int64_t c = 0; c < GROUP; c++) {
      const uint16_t want = t < T ? x[t * I + first + c] : 0;
      if (laid[(t / 2 * GROUP + c) * 2 + t % 2] != want || rows[c * ROW_STRIDE + t] != want) {
        std::printf("columns laid by %s are wrong at %ld\n", products.name, long(number));
        std::exit(1);
      }
    }
}

// Their codes need no padding: whatever is read is inside.
void check_trellis(const std::vector<const Kernels*>& all, int64_t number) {
  Memory memory;
  Trellis w = {};
  w.I = one_of<int64_t>({1, 2, 31, 255, 256, 257, 600});
  w.bits = int(2 + below(3));
  w.ring = one_of<int64_t>({1, 5, 15, 16, 17, 32, 48, 80, 112, 240, 256});
  w.states = int(std::min<int64_t>(w.ring * w.bits, 2 + below(15)));
  w.bytes = (w.ring * w.bits + 7) / 8;
  const int64_t bands = 1 + below(2), band = below(bands), O = bands * w.ring, T = below(9);
  w.codes = memory.exactly(random_bytes(bands * w.I * w.bytes));
  Inputs in = random_inputs(memory, T, w.I, INPUTS_AT_ONCE, (w.I + INPUTS_AT_ONCE - 1) / INPUTS_AT_ONCE, false);
  const int64_t first = INPUTS_AT_ONCE * below((w.I + INPUTS_AT_ONCE - 1) / INPUTS_AT_ONCE), last = first + 1 + below(w.I - first);
  // The sums are of whole groups, which the last one here need not be.
  for (int64_t t = 0; t < T; t++) {
    float* const sums = const_cast<float*>(in.group_sum) + t * in.sums;
    sums[(last - 1) / INPUTS_AT_ONCE] = 0;
    for (int64_t i = (last - 1) / INPUTS_AT_ONCE * INPUTS_AT_ONCE; i < last; i++)
      sums[(last - 1) / INPUTS_AT_ONCE] += in.x[t * in.stride + i];
  }
  const bool bf16 = chance(0.5);
  const int64_t size = bf16 ? 2 : 4, count = (last - first) * w.ring;
  // No byte more than the band of the last token and of the last input.
  const int64_t outputs = T ? (T - 1) * O + w.ring : 0;
  const Floats x = memory.values(2 * w.I, one_of<Float>({Float::f32, Float::bf16, Float::f16}), true);
  const Floats scale = memory.values(w.I, one_of<Float>({Float::f32, Float::bf16, Float::f16}), true);
  const int64_t block = std::min<int64_t>(w.I & -w.I, one_of<int64_t>({1, 2, 8, 16, 128}));
  float *want = memory.floats(outputs), *want_in = memory.floats(w.I);
  uint8_t* want_weights = memory.exactly(std::vector<uint8_t>(count * size));
  trellis_plain.dot(w, in, band, first, last, want, O);
  trellis_plain.expand(w, band, first, last, want_weights, w.ring, bf16);
  trellis_plain.rotate_in(x, w.I, scale, w.I, block, want_in);
  for (const Kernels* kernels : all) {
    float *y = memory.floats(outputs), *to = memory.floats(w.I);
    uint8_t* weights = memory.exactly(std::vector<uint8_t>(count * size));
    kernels->trellis->dot(w, in, band, first, last, y, O);
    for (int64_t t = 0; t < T; t++) {
      float largest = 0;
      for (int64_t i = 0; i < in.stride; i++) largest += std::fabs(in.x[t * in.stride + i]);
      for (int64_t o = 0; o < w.ring; o++)
        if (!(std::fabs(y[t * O + o] - want[t * O + o]) <= 1e-5f * largest * 2 * MIDDLE)) fail("trellis dot", *kernels, number);
    }
    kernels->trellis->expand(w, band, first, last, weights, w.ring, bf16);
    if (std::memcmp(weights, want_weights, count * size)) fail("trellis expand", *kernels, number);
    kernels->trellis->rotate_in(x, w.I, scale, w.I, block, to);
    compare_row(to, want_in, w.I, 1e-5f * 64 * 128, *kernels, number);
    kernels->trellis->rotate_out(to, scale, 0.25f, w.I, block);
    trellis_plain.rotate_out(want_in, scale, 0.25f, w.I, block);
    compare_row(to, want_in, w.I, 1e-5f * 64 * 128 * 128 * 8, *kernels, number);
    trellis_plain.rotate_in(x, w.I, scale, w.I, block, want_in);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !std::strcmp(arguments[1], "unpadded")) padding = 0;
  std::vector<const Kernels*> all;
  for (const Kernels* kernels : {&plain_kernels, avx2_kernels(), vnni_kernels(), avx512_kernels()})
    if (kernels) {
      all.push_back(kernels);
      std::printf("%s\n", kernels->name);
    }
  for (int64_t number = 0; number < 3000; number++) {
    check_sparse(all, number);
    check_coded(all, number);
    if (number % 4 == 0) check_trellis(all, number);
    check_columns(all, number);
    check_step(all, number);
    for (const Products* products : {bf16_products(), amx_products()})
      if (products && number % 8 == 0) {
        check_products(*products, number);
        check_columns_laid(*products, number);
      }
  }
  std::printf("all agree\n");
}
