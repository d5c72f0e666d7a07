// Few rows of A times B whose columns are contiguous in memory: y = x Wᵀ of a token or a sentence.
//
// Packing B would read it, write it and read it again for a handful of rows. Here it is read once,
// in place: a register holds kWidth lanes of one dot product, kWidth products run side by side, and
// their lanes are added up at the end, all kWidth sums in one transposing tree.
#pragma once
#include "pack.h"

namespace ft::FT_ISA {

template <typename D>
FT_INLINE auto as_lanes(UVec v) {
  return as<decltype(D::load_lanes(nullptr))>(v);
}

// kRows x (kWidth / kRows) dot products over k elements; row r of the result is at c + r * ldc, to
// which it is added with `accumulate`. `w` are the columns of B, from element `at` on.
template <typename D, typename T, int kRows>
FT_INLINE void dot_tile(const typename D::Lane* x, int64_t x_ld, const T* const* w, int64_t at,
                        int64_t k, float* c, int64_t ldc, bool accumulate) {
  constexpr int kCols = kWidth / kRows;
  Vec acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
  const int64_t depth = lanes<D>(k);
  const auto step = [&](int64_t l, const auto& load_x,
                        const auto& load_w) __attribute__((always_inline)) {
    decltype(D::load_lanes(x)) row[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) row[r] = load_x(x + r * x_ld + l);
#pragma GCC unroll 16
    for (int j = 0; j < kCols; ++j) {
      const auto column = load_w(w[j] + at + l * D::kPerLane);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        acc[r * kCols + j] = D::multiply_add(row[r], column, acc[r * kCols + j]);
      }
    }
  };
  const int64_t whole = k / (kWidth * D::kPerLane) * kWidth;
  for (int64_t l = 0; l < whole; l += kWidth) {
    step(
        l, [](const typename D::Lane* p) { return D::load_lanes(p); },
        [](const T* p) { return as_lanes<D>(load_row_lanes<D>(p, kWidth * D::kPerLane)); });
  }
  if (whole < depth) {
    step(
        whole,
        [&](const typename D::Lane* p) {
          UVec v{};
          std::memcpy(&v, p, (depth - whole) * sizeof(*p));
          return as_lanes<D>(v);
        },
        [&](const T* p) { return as_lanes<D>(load_row_lanes<D>(p, k - whole * D::kPerLane)); });
  }
  UVec bits[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) bits[i] = as<UVec>(acc[i]);
  float total[kWidth];
  store(total, fold_each(bits, [](Vec a, Vec b) { return a + b; }));
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kCols; ++j) {
      float& to = c[r * ldc + j];
      to = accumulate ? to + total[r * kCols + j] : total[r * kCols + j];
    }
  }
}

// C (rows x kTileCols) = x · columns; x: rows of lanes, `w`: `cols` <= kTileCols columns of B.
template <typename D, typename T>
void dots(const typename D::Lane* x, int64_t x_ld, int64_t rows, const T* w, int64_t ld,
          int64_t cols, int64_t k, float* c) {
  constexpr int kMost = kWidth >= 16 ? 4 : 2;                   // rows at once
  constexpr int64_t kBlock = kSumLanes * kWidth * D::kPerLane;  // a lane of it sums kSumLanes
  for (int64_t n = 0; n < cols; n += kWidth, c += kWidth) {
    const T* column[kWidth];
    for (int j = 0; j < kWidth; ++j) column[j] = w + (n + j < cols ? n + j : cols - 1) * ld;
    const auto rows_at_once = [&]<int kRows>(std::integral_constant<int, kRows>, int64_t r) {
      for (int j = 0; j < kWidth; j += kWidth / kRows) {
        for (int64_t at = 0; at == 0 || at < k; at += kBlock) {
          dot_tile<D, T, kRows>(x + r * x_ld + at / D::kPerLane, x_ld, column + j, at,
                                std::min(kBlock, k - at), c + r * kTileCols + j, kTileCols, at > 0);
        }
      }
    };
    int64_t r = 0;
    for (; r + kMost <= rows; r += kMost) {
      rows_at_once(std::integral_constant<int, kMost>(), r);
    }
    if constexpr (kMost > 2) {
      if (r + 2 <= rows) {
        rows_at_once(std::integral_constant<int, 2>(), r);
        r += 2;
      }
    }
    if (r < rows) rows_at_once(std::integral_constant<int, 1>(), r);
  }
}

}  // namespace ft::FT_ISA
