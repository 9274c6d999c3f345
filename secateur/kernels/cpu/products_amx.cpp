// Products by the tiles of AMX (Sapphire Rapids and later): 16 rows of 32 columns with 16 tokens in one instruction.

#include "products.h"

#if defined(__linux__) && defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#endif

namespace secateur {
namespace {

// Sums in tiles 0 to 3, weights in 4 and 5, inputs in 6 and 7: all of 16 rows of 64 bytes.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A times 16 rows, and G groups.
template <int A, int G>
inline void part(const Block& b, int64_t group) {
  const int64_t w_bytes = 2 * ROW_STRIDE, y_bytes = 4 * b.y_stride;
  const uint16_t *w = b.w, *w_below = w + GROUP * ROW_STRIDE;
  const uint16_t *x = b.x + group * b.apart, *x_after = x + b.apart;
  float *const y = b.y + group * GROUP, *const y_below = y + GROUP * b.y_stride;
  if (b.more) {
    _tile_loadd(0, y, y_bytes);
    if (G > 1) _tile_loadd(1, y + GROUP, y_bytes);
    if (A > 1) _tile_loadd(2, y_below, y_bytes);
    if (A > 1 && G > 1) _tile_loadd(3, y_below + GROUP, y_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < b.depth; k += STEP, w += STEP, w_below += STEP, x += STEP * GROUP, x_after += STEP * GROUP) {
    _tile_loadd(4, w, w_bytes);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (G > 1) {
      _tile_loadd(7, x_after, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (A > 1) {
      _tile_loadd(5, w_below, w_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (G > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y, y_bytes);
  if (G > 1) _tile_stored(1, y + GROUP, y_bytes);
  if (A > 1) _tile_stored(2, y_below, y_bytes);
  if (A > 1 && G > 1) _tile_stored(3, y_below + GROUP, y_bytes);
}

template <int A>
inline void all_groups(const Block& b) {
  int64_t group = 0;
  for (; group + 2 <= b.groups; group += 2) part<A, 2>(b, group);
  if (group < b.groups) part<A, 1>(b, group);
}

void multiply(const Block& b) {
  const Config config;
  _tile_loadconfig(&config);
  b.rows > GROUP ? all_groups<2>(b) : all_groups<1>(b);
  _tile_release();
}

// Linux gives a process the tiles' registers when it asks for them.
bool may_use_tiles() {
  constexpr int request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace
}  // namespace secateur

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace secateur {
const Products* amx_products() {
  const Products* const others = bf16_products();
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!others || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !may_use_tiles()) return nullptr;
  static const Products products = [&] {
    Products same = *others;
    same.name = "AMX";
    same.multiply = multiply;
    return same;
  }();
  return &products;
}
}  // namespace secateur

#else
namespace secateur {
const Products* amx_products() { return nullptr; }
}  // namespace secateur
#endif
