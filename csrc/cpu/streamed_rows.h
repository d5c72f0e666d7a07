// Few rows of A times B whose rows are contiguous in memory: y = x W of a token, W (in, out).
//
// The twin of dots.h for a weight that lies the other way round. B is read once, in place, in long
// runs: kSteps lanes' rows of it at a time are weighed and added to C, a segment of columns that
// stays in L1. Where lanes are pairs, two rows are interleaved in registers, as in weighted_rows.h;
// C's columns come in that order and are put right at the end.
#pragma once
#include "weighted_rows.h"

namespace ft::FT_ISA {

inline constexpr int64_t kSegmentCols = 512;
inline constexpr int64_t kRowsAhead = 16;  // are fetched while a row is read

// c (kRows x cols) += x · rows of kSteps lanes, summed from zero and then added; C is overwritten
// where they are the first. `b`: the first of these rows.
template <typename D, typename T, int kRows, int kSteps>
void stream_steps(const typename D::Lane* x, int64_t x_ld, const T* b, int64_t ld, int64_t begin,
                  int64_t end, float* c, int64_t ldc, bool first) {
  constexpr int kVecs = 2, kLine = 64 / sizeof(T);
  const T* rows[kSteps * D::kPerLane];
  for (int i = 0; i < kSteps * D::kPerLane; ++i) rows[i] = b + i * ld;
  const auto columns = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t col) {
    Vec acc[kRows][kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kSteps; ++i) {
      UVec v[kCount];
      load_keys<D, T>(rows + i * D::kPerLane, col, end - col, v);
      for (int j = 0; j < D::kPerLane; ++j) {
        const T* ahead = rows[i * D::kPerLane + j] + kRowsAhead * ld + col;
#pragma GCC unroll 2
        for (int line = 0; line < kCount * kWidth; line += kLine) __builtin_prefetch(ahead + line);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto weight = D::broadcast_lane(x[r * x_ld + i]);
#pragma GCC unroll 2
        for (int k = 0; k < kCount; ++k) {
          acc[r][k] = D::multiply_add(weight, as_lanes<D>(v[k]), i == 0 ? zero() : acc[r][k]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int k = 0; k < kCount; ++k) {
        float* to = c + r * ldc + col + k * kWidth;
        store(to, first ? acc[r][k] : load(to) + acc[r][k]);
      }
    }
  };
  int64_t col = begin;
  for (; col + kVecs * kWidth <= end; col += kVecs * kWidth) {
    columns(std::integral_constant<int, kVecs>(), col);
  }
  for (; col < end; col += kWidth) columns(std::integral_constant<int, 1>(), col);
}

// C (rows x cols, whole vectors, ldc apart) = x · B, with C's columns in the order of load_keys.
// `depth` whole lanes of B's rows.
template <typename D, typename T>
void stream_lanes(const typename D::Lane* x, int64_t x_ld, int64_t rows, const T* b, int64_t ld,
                  int64_t cols, int64_t depth, float* c, int64_t ldc) {
  constexpr int kSteps = 16 / D::kPerLane;
  const auto steps = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t l) {
    const int64_t segment = rows > 4 ? kSegmentCols : cols;
    for (int64_t n = 0; n < cols; n += segment) {
      const int64_t end = std::min(cols, n + segment);
      for_row_blocks(rows, [&]<int kRows>(std::integral_constant<int, kRows>, int64_t r) {
        stream_steps<D, T, kRows, kCount>(x + r * x_ld + l, x_ld, b + l * D::kPerLane * ld, ld, n,
                                          end, c + r * ldc, ldc, l == 0);
      });
    }
  };
  int64_t l = 0;
  for (; l + kSteps <= depth; l += kSteps) steps(std::integral_constant<int, kSteps>(), l);
  for (; l < depth; ++l) steps(std::integral_constant<int, 1>(), l);
}

// Element k of a row of lanes.
template <typename D>
FT_INLINE float element(const typename D::Lane* x, int64_t k) {
  if constexpr (D::kPerLane == 1) {
    return x[k];
  } else {
    return as<float>(k % 2 ? x[k / 2] & 0xffff0000u : x[k / 2] << 16);
  }
}

// C (rows x cols, whole vectors, ldc apart) = x · B, `k` rows of B.
template <typename D, typename T>
void stream_rows(const typename D::Lane* x, int64_t x_ld, int64_t rows, const T* b, int64_t ld,
                 int64_t cols, int64_t k, float* c, int64_t ldc) {
  const int64_t whole = k / D::kPerLane * D::kPerLane;
  if (whole > 0) {
    stream_lanes<D, T>(x, x_ld, rows, b, ld, cols, whole / D::kPerLane, c, ldc);
  }
  if constexpr (D::kPerLane == 2) {
    for (int64_t r = 0; r < rows; ++r) {
      float* row = c + r * ldc;
#if defined(__AVX512BF16__)
      for (int64_t n = 0; whole > 0 && n + 2 * kWidth <= cols; n += 2 * kWidth) {
        Vec low = load(row + n), high = load(row + n + kWidth);
        put_in_order(low, high);
        store(row + n, low);
        store(row + n + kWidth, high);
      }
#endif
      if (whole == k) continue;  // else the last row has no partner, whose zero would make NaN
      const Vec weight = broadcast(element<D>(x + r * x_ld, k - 1));
      for (int64_t n = 0; n < cols; n += kWidth) {
        const Vec v = load(b + (k - 1) * ld + n, cols - n);
        store(row + n, fma(weight, v, whole > 0 ? load(row + n) : zero()));
      }
    }
  }
}

}  // namespace ft::FT_ISA
