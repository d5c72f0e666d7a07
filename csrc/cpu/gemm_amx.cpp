// The strip of gemm.h in AMX's matrix unit: 32 x 32 of C in four tile registers, two of A and two
// of B beside them. Each step of 16 lanes (32 bf16) loads four tiles and multiplies four times, so
// a tile loaded is used twice; a product takes 16 cycles, a load from L1 eight. The layouts are
// those of the vector tiles: a panel's row of lanes is a row of a B tile as it is.
#include "gemm.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <cstring>

namespace ft::FT_ISA {
namespace {

constexpr int kRows = 16;   // of a tile register
constexpr int kLanes = 16;  // 64 bytes, of a tile register's row
static_assert(kLanes == kMatrixStep && 2 * kLanes == kMatrixCols);
static_assert(kTileCols % kLanes == 0 && BFloat16Dot::kTileRows == 2 * kRows);

// C00 C01 C10 C11, A0 A1, B0 B1. The intrinsics want literal numbers.
#define FT_C00 0
#define FT_C01 1
#define FT_C10 2
#define FT_C11 3
#define FT_A0 4
#define FT_A1 5
#define FT_B0 6
#define FT_B1 7

// The processor's tile configuration: Intel, Software Developer's Manual, LDTILECFG.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  explicit Configuration(int64_t strip_rows) {
    const auto first = static_cast<uint8_t>(strip_rows < kRows ? strip_rows : kRows);
    const auto second = static_cast<uint8_t>(strip_rows - first);
    for (const int tile : {FT_C00, FT_C01, FT_A0}) set(tile, first);
    for (const int tile : {FT_C10, FT_C11, FT_A1}) set(tile, second);
    for (const int tile : {FT_B0, FT_B1}) set(tile, kRows);
  }

 private:
  void set(int tile, uint8_t count) {
    rows[tile] = count;
    bytes[tile] = count == 0 ? 0 : 4 * kLanes;
  }
};
static_assert(sizeof(Configuration) == 64);

thread_local int64_t configured_rows = 0;  // 0: the unit is not ours

void configure(int64_t rows) {
  if (rows == configured_rows) return;
  const Configuration configuration(rows);
  asm volatile("" : : "r"(&configuration) : "memory");  // GCC knows of its first 8 bytes alone
  _tile_loadconfig(&configuration);
  configured_rows = rows;
}

// One step of 16 lanes. Strides in lanes.
template <bool kTwoRows, bool kTwoCols>
FT_INLINE void step(const uint32_t* a0, const uint32_t* a1, int64_t a_stride, const uint32_t* b,
                    int64_t b_stride) {
  _tile_loadd(FT_B0, b, 4 * b_stride);
  _tile_loadd(FT_A0, a0, 4 * a_stride);
  _tile_dpbf16ps(FT_C00, FT_A0, FT_B0);
  if constexpr (kTwoRows) {
    _tile_loadd(FT_A1, a1, 4 * a_stride);
    _tile_dpbf16ps(FT_C10, FT_A1, FT_B0);
  }
  if constexpr (kTwoCols) {
    _tile_loadd(FT_B1, b + kLanes, 4 * b_stride);
    _tile_dpbf16ps(FT_C01, FT_A0, FT_B1);
    if constexpr (kTwoRows) _tile_dpbf16ps(FT_C11, FT_A1, FT_B1);
  }
}

// The last lanes of A and B, where k is no multiple of 16, with zeros behind.
struct alignas(64) Tail {
  uint32_t a[2 * kRows][kLanes];
  uint32_t b[kRows][2 * kLanes];

  void take_a(const LanesA<uint32_t>& from, int64_t rows, int64_t k, int64_t count) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto mask = static_cast<__mmask16>((1u << count) - 1);
      store_bits(a[r], _mm512_maskz_loadu_epi32(mask, from.data + r * from.row_stride + k));
    }
  }
  void take_b(const uint32_t* from, int64_t count, int64_t cols) {
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        store_bits(b[i] + j, i < count ? load_bits<UVec>(from + i * kTileCols + j) : UVec{});
      }
    }
    asm volatile("" : : : "memory");  // GCC does not know that tile loads read memory
  }
};

template <bool kTwoRows, bool kTwoCols>
void block(int64_t k, const LanesA<uint32_t>& a, const uint32_t* b, Tail& tail, float* c,
           int64_t ldc, bool accumulate, const Meanwhile& meanwhile) {
  float* c1 = c + kRows * ldc;
  if (accumulate) {
    _tile_loadd(FT_C00, c, 4 * ldc);
    if constexpr (kTwoCols) _tile_loadd(FT_C01, c + kLanes, 4 * ldc);
    if constexpr (kTwoRows) _tile_loadd(FT_C10, c1, 4 * ldc);
    if constexpr (kTwoRows && kTwoCols) _tile_loadd(FT_C11, c1 + kLanes, 4 * ldc);
  } else {
    _tile_zero(FT_C00);
    if constexpr (kTwoCols) _tile_zero(FT_C01);
    if constexpr (kTwoRows) _tile_zero(FT_C10);
    if constexpr (kTwoRows && kTwoCols) _tile_zero(FT_C11);
  }
  const uint32_t *a0 = a.data, *a1 = a.data + kRows * a.row_stride;
  int64_t l = 0;
  for (; l + kLanes <= k; l += kLanes) {
    step<kTwoRows, kTwoCols>(a0 + l, a1 + l, a.row_stride, b + l * kTileCols, kTileCols);
    if (meanwhile.some) meanwhile.some(meanwhile.context);
  }
  if (l < k) {
    tail.take_b(b + l * kTileCols, k - l, kTwoCols ? 2 * kLanes : kLanes);
    step<kTwoRows, kTwoCols>(tail.a[0], tail.a[kRows], kLanes, tail.b[0], 2 * kLanes);
  }
  _tile_stored(FT_C00, c, 4 * ldc);
  if constexpr (kTwoCols) _tile_stored(FT_C01, c + kLanes, 4 * ldc);
  if constexpr (kTwoRows) _tile_stored(FT_C10, c1, 4 * ldc);
  if constexpr (kTwoRows && kTwoCols) _tile_stored(FT_C11, c1 + kLanes, 4 * ldc);
}

}  // namespace

MatrixUnit::~MatrixUnit() {
  if (configured_rows == 0) return;
  _tile_release();
  configured_rows = 0;
}

void multiply_registers_amx(int64_t steps) {
  configure(2 * kRows);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbf16ps(FT_C00, FT_A0, FT_B0);
    _tile_dpbf16ps(FT_C10, FT_A1, FT_B0);
    _tile_dpbf16ps(FT_C01, FT_A0, FT_B1);
    _tile_dpbf16ps(FT_C11, FT_A1, FT_B1);
  }
}

void multiply_strip_amx(int64_t rows, int64_t cols, int64_t k, const LanesA<uint32_t>& a,
                        const uint32_t* b, int64_t panel_stride, float* c, int64_t ldc,
                        bool accumulate, const Meanwhile& meanwhile) {
  asm volatile("" : : : "memory");  // operands are in memory, though tile loads do not say so
  configure(rows);
  Tail tail;
  if (const int64_t last = k % kLanes) tail.take_a(a, rows, k - last, last);
  for (int64_t n = 0; n < cols; n += kTileCols, b += panel_stride) {
    for (int64_t v = 0; v < kTileCols && n + v < cols; v += kMatrixCols) {
      const bool two_cols = n + v + kLanes < cols;
      const auto run = rows > kRows ? (two_cols ? block<true, true> : block<true, false>)
                                    : (two_cols ? block<false, true> : block<false, false>);
      run(k, a, b + v, tail, c + n + v, ldc, accumulate, meanwhile);
    }
  }
  asm volatile("" : : : "memory");  // and C
}

}  // namespace ft::FT_ISA
#endif
