// Few rows times a matrix that is read in place, in AMX's matrix unit.
//
// One tile of 16 x 16 results serves up to 16 rows at the cost of one, so what is left to pay is
// the reading. The matrix takes a detour through L1, by plain loads in the order of memory: tiles
// that were loaded from where they lie waited for one row after another. For dot products its
// columns are the left operand, so a tile of products is the transpose of what is wanted, and is
// turned in registers. For weighted sums its rows must come in pairs: two at a time are interleaved
// on the way.
#include "few_rows_amx.h"

#if defined(__AMX_BF16__)
#include <algorithm>

#include "parallel.h"
#include "weighted_rows.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kTile = kUnitRows;
static_assert(kTile == kWidth && kUnitPair == 2 * kTile);

// Four tiles of results, and the operands. The intrinsics want literal numbers.
#define FT_C0 0
#define FT_C1 1
#define FT_C2 2
#define FT_C3 3
#define FT_LEFT 4
#define FT_RIGHT0 5
#define FT_RIGHT1 6

}  // namespace

FewRowsUnit::FewRowsUnit(bool wanted) : held_(wanted) {
  if (!wanted) return;
  struct alignas(64) {  // Intel, Software Developer's Manual, LDTILECFG
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } configuration;
  for (int tile = FT_C0; tile <= FT_RIGHT1; ++tile) {
    configuration.bytes[tile] = 4 * kTile;
    configuration.rows[tile] = kTile;
  }
  asm volatile("" : : "r"(&configuration) : "memory");  // GCC knows of its first 8 bytes alone
  _tile_loadconfig(&configuration);
}
FewRowsUnit::~FewRowsUnit() {
  if (held_) _tile_release();
}

// As right operands: lane l of row r goes to row l of tile (r / 16, l / 16), column r.
void pack_rows_amx(const uint32_t* rows, int64_t ld, int64_t count, int64_t depth,
                   uint32_t* packed) {
  for (int64_t r = 0; r < count; r += kTile) {
    for (int64_t l = 0; l < depth; l += kTile, packed += kTile * kTile) {
      UVec block[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        block[i] = UVec{};
        const int64_t here = std::min<int64_t>(kTile, depth - l);
        if (r + i < count) std::memcpy(&block[i], rows + (r + i) * ld + l, 4 * here);
      }
      transpose(block);
      for (int64_t i = 0; i < kTile; ++i) store_bits(packed + i * kTile, block[i]);
    }
  }
}

namespace {

// Rows in kTiles tiles, of which each has `tile_size` lanes of operands.
template <int kTiles>
void dot_tiles(const uint32_t* packed, int64_t tile_size, int64_t rows, int64_t k,
               const bf16* const* columns, int64_t count, bf16* copies, float* products,
               int64_t ld) {
  alignas(64) float results[kTile][kTile];
  const int64_t most = in_whole(std::min(k, kUnitDepth), kUnitPair);
  const int64_t steps = ceil_div(k, kUnitDepth), size = kTile * most;
  // Step `at` takes elements from (at % steps) * kUnitDepth on of 16 columns.
  const auto copy = [&](int64_t at) {
    const int64_t j = at / steps * kTile, d0 = at % steps * kUnitDepth;
    const int64_t depth = std::min(k - d0, kUnitDepth);
    bf16* to = copies + at % 2 * size;
    for (int i = 0; i < kTile; ++i, to += most) {
      for (int64_t d = 0; d < depth; d += kUnitPair) {
        store_bits(to + d, load_row_lanes<BFloat16Dot>(columns[j + i] + d0 + d, depth - d));
      }
    }
    asm volatile("" : : : "memory");  // tile loads do not say that they read memory
  };
  const auto write = [&](int64_t j, int64_t r) {
    asm volatile("" : : : "memory");
    UVec block[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) block[i] = load_bits<UVec>(results[i]);
    transpose(block);
    for (int64_t i = 0; i < std::min<int64_t>(kTile, rows - r); ++i) {
      store_bits(products + (r + i) * ld + j, block[i]);
    }
  };
  const auto multiply = [&](int64_t at) {
    const int64_t j = at / steps * kTile, d0 = at % steps * kUnitDepth;
    const int64_t depth = std::min(k - d0, kUnitDepth);
    const bf16* left = copies + at % 2 * size;
    const uint32_t* right = packed + d0 / kUnitPair * kTile * kTile;
    if (d0 == 0) {
      _tile_zero(FT_C0);
      if constexpr (kTiles > 1) _tile_zero(FT_C1);
      if constexpr (kTiles > 2) _tile_zero(FT_C2);
      if constexpr (kTiles > 3) _tile_zero(FT_C3);
    }
    for (int64_t d = 0; d < depth; d += kUnitPair, right += kTile * kTile) {
      _tile_loadd(FT_LEFT, left + d, most * sizeof(bf16));
      _tile_loadd(FT_RIGHT0, right, 4 * kTile);
      _tile_dpbf16ps(FT_C0, FT_LEFT, FT_RIGHT0);
      if constexpr (kTiles > 1) {
        _tile_loadd(FT_RIGHT1, right + tile_size, 4 * kTile);
        _tile_dpbf16ps(FT_C1, FT_LEFT, FT_RIGHT1);
      }
      if constexpr (kTiles > 2) {
        _tile_loadd(FT_RIGHT0, right + 2 * tile_size, 4 * kTile);
        _tile_dpbf16ps(FT_C2, FT_LEFT, FT_RIGHT0);
      }
      if constexpr (kTiles > 3) {
        _tile_loadd(FT_RIGHT1, right + 3 * tile_size, 4 * kTile);
        _tile_dpbf16ps(FT_C3, FT_LEFT, FT_RIGHT1);
      }
    }
    if (at % steps < steps - 1) return;
    _tile_stored(FT_C0, results, 4 * kTile);
    write(j, 0);
    if constexpr (kTiles > 1) {
      _tile_stored(FT_C1, results, 4 * kTile);
      write(j, kTile);
    }
    if constexpr (kTiles > 2) {
      _tile_stored(FT_C2, results, 4 * kTile);
      write(j, 2 * kTile);
    }
    if constexpr (kTiles > 3) {
      _tile_stored(FT_C3, results, 4 * kTile);
      write(j, 3 * kTile);
    }
  };
  const int64_t all = ceil_div(count, kTile) * steps;
  copy(0);
  for (int64_t at = 0; at < all; ++at) {
    if (at + 1 < all) copy(at + 1);
    multiply(at);
  }
}

}  // namespace

void dot_rows_amx(const uint32_t* packed, int64_t rows, int64_t k, const bf16* const* columns,
                  int64_t count, bf16* copies, float* products, int64_t ld) {
  constexpr int64_t kMost = 4 * kTile;
  const int64_t tile_size = unit_rows(kTile, k);
  for (int64_t r = 0; r < rows; r += kMost, packed += 4 * tile_size, products += kMost * ld) {
    const int64_t here = std::min(kMost, rows - r), tiles = ceil_div(here, kTile);
    const auto run = tiles == 1   ? dot_tiles<1>
                     : tiles == 2 ? dot_tiles<2>
                     : tiles == 3 ? dot_tiles<3>
                                  : dot_tiles<4>;
    run(packed, tile_size, here, k, columns, count, copies, products, ld);
  }
}

void weigh_rows_amx(const uint32_t* weights, int64_t w_ld, int64_t rows, int64_t count,
                    const bf16* const* values, int64_t dim, float* out, int64_t out_ld) {
  alignas(64) uint32_t pairs[2][4][kTile][kTile];
  alignas(64) float results[4][kTile][kTile];
  for (int64_t r = 0; r < rows; r += kTile) {
    const uint32_t* w = weights + r * w_ld;
    for (int64_t col = 0; col < dim; col += 2 * kUnitPair) {
      const bool two = dim - col > kUnitPair;  // blocks of columns
      const auto multiply = [&](int64_t j, const uint32_t (&of_keys)[4][kTile][kTile]) {
        _tile_loadd(FT_LEFT, w + j / 2, 4 * w_ld);
        _tile_loadd(FT_RIGHT0, of_keys[0], 4 * kTile);
        _tile_loadd(FT_RIGHT1, of_keys[1], 4 * kTile);
        _tile_dpbf16ps(FT_C0, FT_LEFT, FT_RIGHT0);
        _tile_dpbf16ps(FT_C1, FT_LEFT, FT_RIGHT1);
        if (two) {
          _tile_loadd(FT_RIGHT0, of_keys[2], 4 * kTile);
          _tile_loadd(FT_RIGHT1, of_keys[3], 4 * kTile);
          _tile_dpbf16ps(FT_C2, FT_LEFT, FT_RIGHT0);
          _tile_dpbf16ps(FT_C3, FT_LEFT, FT_RIGHT1);
        }
      };
      const auto interleave = [&](const bf16* const* keys, int64_t c, uint32_t* low,
                                  uint32_t* high) __attribute__((always_inline)) {
        const UVec a = load_row_lanes<BFloat16Dot>(keys[0] + c, dim - c);
        const UVec b = load_row_lanes<BFloat16Dot>(keys[1] + c, dim - c);
        store_bits(low, interleave_low(a, b));
        store_bits(high, interleave_high(a, b));
      };
      _tile_zero(FT_C0);
      _tile_zero(FT_C1);
      _tile_zero(FT_C2);
      _tile_zero(FT_C3);
      // A tile is not loaded before its stores have reached the cache, so each waits one round.
      for (int64_t j = 0; j < count; j += kUnitPair) {
        auto& to = pairs[j / kUnitPair % 2];
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) {
          interleave(values + j + 2 * i, col, to[0][i], to[1][i]);
          if (two) interleave(values + j + 2 * i, col + kUnitPair, to[2][i], to[3][i]);
        }
        asm volatile("" : : : "memory");  // tile loads do not say that they read memory
        if (j > 0) multiply(j - kUnitPair, pairs[(j / kUnitPair + 1) % 2]);
      }
      multiply(count - kUnitPair, pairs[(count / kUnitPair + 1) % 2]);
      _tile_stored(FT_C0, results[0], 4 * kTile);
      _tile_stored(FT_C1, results[1], 4 * kTile);
      _tile_stored(FT_C2, results[2], 4 * kTile);
      _tile_stored(FT_C3, results[3], 4 * kTile);
      asm volatile("" : : : "memory");
      for (int64_t i = 0; i < std::min<int64_t>(kTile, rows - r); ++i) {
        for (int64_t block = 0; block < (two ? 2 : 1); ++block) {
          Vec low = load(results[2 * block][i]), high = load(results[2 * block + 1][i]);
          put_in_order(low, high);
          float* to = out + (r + i) * out_ld + col + block * kUnitPair;
          store(to, low);
          store(to + kTile, high);
        }
      }
    }
  }
}

}  // namespace ft::FT_ISA
#endif
