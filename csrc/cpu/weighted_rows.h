// out (+)= P V for few rows of P, with the rows of V read in place, wherever each of them lies.
//
// Packing V would read it, write it and read it again for a handful of rows. kRows x kVecs
// accumulators stay in registers while the keys run. Where lanes are pairs, two rows of V are
// interleaved in registers; their columns then come in another order, which is undone at the end.
#pragma once
#include "dots.h"

namespace ft::FT_ISA {

// Calls `f` with the number of rows as a compile-time constant, and the first of them, for blocks
// of rows that kWidth accumulators serve well.
template <typename F>
FT_INLINE void for_row_blocks(int64_t count, const F& f) {
  constexpr int kMost = kWidth >= 16 ? 4 : 2;
  int64_t r = 0;
  for (; r + kMost <= count; r += kMost) f(std::integral_constant<int, kMost>(), r);
  if constexpr (kMost > 2) {
    if (r + 2 <= count) {
      f(std::integral_constant<int, 2>(), r);
      r += 2;
    }
  }
  if (r < count) f(std::integral_constant<int, 1>(), r);
}

// The halves of two vectors of bf16, interleaved in groups of four columns; and the sums of both,
// put in the order of their columns again.
#if defined(__AVX512BF16__)
FT_INLINE UVec interleave_low(UVec a, UVec b) {
  return (UVec)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
}
FT_INLINE UVec interleave_high(UVec a, UVec b) {
  return (UVec)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
FT_INLINE void put_in_order(Vec& low, Vec& high) {
  const Vec first =
      __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  high = __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29,
                                 30, 31);
  low = first;
}
#endif

// kVecs vectors of lanes from column `col` on, of one key or of a pair; of a single vector only
// `left` columns exist.
template <typename D, typename T, int kVecs>
FT_INLINE void load_keys(const T* const* rows, int64_t col, int64_t left, UVec (&to)[kVecs]) {
  if constexpr (D::kPerLane == 1) {
#pragma GCC unroll 4
    for (int k = 0; k < kVecs; ++k) {
      const T* at = rows[0] + col + k * kWidth;
      to[k] = as<UVec>(kVecs == 1 ? load(at, left) : load(at));
    }
  } else if constexpr (kVecs == 1) {  // a bf16 is the upper half of its float
    to[0] = as<UVec>(load(rows[0] + col, left)) >> 16 | as<UVec>(load(rows[1] + col, left));
  } else {
#if defined(__AVX512BF16__)
#pragma GCC unroll 2
    for (int k = 0; k < kVecs; k += 2) {
      const UVec a = load_bits<UVec>(rows[0] + col + k * kWidth);
      const UVec b = load_bits<UVec>(rows[1] + col + k * kWidth);
      to[k] = interleave_low(a, b);
      to[k + 1] = interleave_high(a, b);
    }
#endif
  }
}

// Columns [col, col + kVecs vectors) of kRows rows of `out` from `depth` lanes of keys.
template <typename D, typename T, int kRows, int kVecs>
void weigh(const typename D::Lane* p, int64_t p_ld, int64_t depth, const T* const* rows,
           int64_t col, int64_t left, float* out, int64_t out_ld, bool accumulate) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < kVecs; ++k) acc[r][k] = zero();
  }
  for (int64_t l = 0; l < depth; ++l, rows += D::kPerLane) {
    UVec v[kVecs];
    load_keys<D, T>(rows, col, left, v);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto weight = D::broadcast_lane(p[r * p_ld + l]);
#pragma GCC unroll 4
      for (int k = 0; k < kVecs; ++k) {
        acc[r][k] = D::multiply_add(weight, as_lanes<D>(v[k]), acc[r][k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if constexpr (D::kPerLane == 2) {
#pragma GCC unroll 2
      for (int k = 0; k + 1 < kVecs; k += 2) put_in_order(acc[r][k], acc[r][k + 1]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVecs; ++k) {
      float* to = out + r * out_ld + col + k * kWidth;
      store(to, accumulate ? load(to) + acc[r][k] : acc[r][k]);
    }
  }
}

// `out` (count x cols, in whole vectors) from the probabilities of depth lanes of keys, whose
// values are at rows[0], rows[1], …: an even number of them where lanes are pairs.
template <typename D, typename T>
void weigh_rows(const typename D::Lane* p, int64_t p_ld, int64_t count, int64_t depth,
                const T* const* rows, int64_t cols, float* out, int64_t out_ld, bool accumulate) {
  const auto all_columns = [&]<int kRows>(std::integral_constant<int, kRows>, int64_t r) {
    const auto* from = p + r * p_ld;
    float* to = out + r * out_ld;
    int64_t col = 0;
    for (; col + 4 * kWidth <= cols; col += 4 * kWidth) {
      weigh<D, T, kRows, 4>(from, p_ld, depth, rows, col, 0, to, out_ld, accumulate);
    }
    for (; col + 2 * kWidth <= cols; col += 2 * kWidth) {
      weigh<D, T, kRows, 2>(from, p_ld, depth, rows, col, 0, to, out_ld, accumulate);
    }
    for (; col < cols; col += kWidth) {
      weigh<D, T, kRows, 1>(from, p_ld, depth, rows, col, cols - col, to, out_ld, accumulate);
    }
  };
  for_row_blocks(count, all_columns);
}

}  // namespace ft::FT_ISA
