// The two products of decode in AMX's matrix unit, on rows of a cache that are read in place.
//
// One tile of 16 x 16 results serves up to 16 query rows at the cost of one, so what is left to pay
// is the reading. Both operands from the cache take a detour through L1, by plain loads in the
// order of memory: tiles that were loaded from where they lie waited for one row after another.
// Keys are the left operand, so a tile of products is the transpose of what is wanted, and is
// turned in registers. Values must come in pairs of keys: two rows at a time are interleaved on the
// way.
#include "decode_amx.h"

#if defined(__AMX_BF16__)
#include <algorithm>

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

DecodeUnit::DecodeUnit(bool wanted) : held_(wanted) {
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
DecodeUnit::~DecodeUnit() {
  if (held_) _tile_release();
}

// As right operands: lane l of row r goes to row l of tile (r / 16, l / 16), column r.
void pack_queries_amx(const uint32_t* rows, int64_t count, int64_t depth, uint32_t* queries) {
  for (int64_t r = 0; r < count; r += kTile) {
    for (int64_t l = 0; l < depth; l += kTile, queries += kTile * kTile) {
      UVec block[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        block[i] = UVec{};
        const int64_t here = std::min<int64_t>(kTile, depth - l);
        if (r + i < count) std::memcpy(&block[i], rows + (r + i) * depth + l, 4 * here);
      }
      transpose(block);
      for (int64_t i = 0; i < kTile; ++i) store_bits(queries + i * kTile, block[i]);
    }
  }
}

void multiply_keys_amx(const uint32_t* queries, int64_t rows, int64_t dim, const bf16* const* keys,
                       int64_t count, bf16* copies, float* products, int64_t ld) {
  alignas(64) float results[kTile][kTile];
  const int64_t padded = in_whole(dim, kUnitPair), size = kTile * padded;
  const auto copy = [&](int64_t j) {
    bf16* to = copies + j / kTile % 2 * size;
    for (int i = 0; i < kTile; ++i, to += padded) {
      for (int64_t d = 0; d < dim; d += kUnitPair) {
        store_bits(to + d, load_row_lanes<BFloat16Dot>(keys[j + i] + d, dim - d));
      }
    }
    asm volatile("" : : : "memory");  // tile loads do not say that they read memory
  };
  const auto multiply = [&](int64_t j) {
    const bf16* left = copies + j / kTile % 2 * size;
    const uint32_t* right = queries;
    for (int64_t r = 0; r < rows; r += kTile) {
      _tile_zero(FT_C0);
      for (int64_t d = 0; d < padded; d += kUnitPair, right += kTile * kTile) {
        _tile_loadd(FT_LEFT, left + d, padded * sizeof(bf16));
        _tile_loadd(FT_RIGHT0, right, 4 * kTile);
        _tile_dpbf16ps(FT_C0, FT_LEFT, FT_RIGHT0);
      }
      _tile_stored(FT_C0, results, 4 * kTile);
      asm volatile("" : : : "memory");
      UVec block[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) block[i] = load_bits<UVec>(results[i]);
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(kTile, rows - r); ++i) {
        store_bits(products + (r + i) * ld + j, block[i]);
      }
    }
  };
  int64_t j = 0;
  for (; j < count; j += kTile) {
    copy(j);
    if (j > 0) multiply(j - kTile);
  }
  multiply(j - kTile);
}

void weigh_values_amx(const uint32_t* probabilities, int64_t p_ld, int64_t rows, int64_t count,
                      const bf16* const* values, int64_t dim, float* out, int64_t out_ld) {
  alignas(64) uint32_t pairs[2][4][kTile][kTile];
  alignas(64) float results[4][kTile][kTile];
  for (int64_t r = 0; r < rows; r += kTile) {
    const uint32_t* p = probabilities + r * p_ld;
    for (int64_t col = 0; col < dim; col += 2 * kUnitPair) {
      const bool two = dim - col > kUnitPair;  // blocks of columns
      const auto multiply = [&](int64_t j, const uint32_t (&of_keys)[4][kTile][kTile]) {
        _tile_loadd(FT_LEFT, p + j / 2, 4 * p_ld);
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
