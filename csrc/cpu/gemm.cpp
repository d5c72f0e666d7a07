// The microkernel of gemm.h, instantiated for every tile size.
#include "gemm.h"

#include <utility>

namespace ft::FT_ISA {
namespace {

template <typename D, int kRows, int kVecs>
void tile(int64_t k, const typename D::Lane* a, int64_t row_stride, int64_t k_stride,
          const typename D::Lane* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[m][v] = zero();
  }
#pragma GCC unroll 2  // 7% on Sapphire Rapids
  for (int64_t i = 0; i < k; ++i, a += k_stride, b += ldb) {
    decltype(D::load_lanes(b)) row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) row[v] = D::load_lanes(b + v * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const auto lane = D::broadcast_lane(a[m * row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[m][v] = D::multiply_add(lane, row[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* out = c + m * ldc + v * kWidth;
      store(out, accumulate ? load(out) + acc[m][v] : acc[m][v]);
    }
  }
}

template <typename D, int kRows, int... kVecs>
constexpr void fill_row(TileTable<D>& table, std::integer_sequence<int, kVecs...>) {
  ((table.at[kRows - 1][kVecs] = tile<D, kRows, kVecs + 1>), ...);
}
template <typename D, int... kRows>
constexpr TileTable<D> make_table(std::integer_sequence<int, kRows...>) {
  TileTable<D> table{};
  (fill_row<D, kRows + 1>(table, std::make_integer_sequence<int, kTileVecs>()), ...);
  return table;
}

}  // namespace

template <typename D>
const TileTable<D> Tiles<D>::table = make_table<D>(std::make_integer_sequence<int, D::kTileRows>());

template struct Tiles<FloatDot>;
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template struct Tiles<BFloat16Dot>;
#endif

}  // namespace ft::FT_ISA
