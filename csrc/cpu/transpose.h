// kWidth vectors against kWidth lanes: transposing them in registers, and folding each to one
// number.
//
// Both are trees of butterflies. The second does the work of kWidth horizontal reductions in that
// of about four, and none of its steps waits for the one before.
#pragma once
#include <utility>

#include "simd.h"

namespace ft::FT_ISA {

// One butterfly of a register transpose: swaps the off-diagonal kStep x kStep blocks.
template <int kStep, int... kLane>
FT_INLINE void swap_blocks(UVec& a, UVec& b, std::integer_sequence<int, kLane...>) {
  const UVec low =
      __builtin_shufflevector(a, b, ((kLane & kStep) ? kWidth + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) ? kWidth + kLane : kLane + kStep)...);
  a = low;
}
template <int kStep = kWidth / 2>
FT_INLINE void transpose(UVec (&r)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (!(i & kStep)) {
      swap_blocks<kStep>(r[i], r[i + kStep], std::make_integer_sequence<int, kWidth>());
    }
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(r);
}

// Lane i of the result is `op` over the lanes of v[i]: neighbours first, then pairs, …
template <int kStep = 1, typename Op>
FT_INLINE Vec fold_each(UVec (&v)[kWidth / kStep], const Op& op) {
  if constexpr (kStep == kWidth) {
    return as<Vec>(v[0]);
  } else {
    UVec half[kWidth / kStep / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / kStep / 2; ++i) {
      swap_blocks<kStep>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kWidth>());
      half[i] = as<UVec>(op(as<Vec>(v[2 * i]), as<Vec>(v[2 * i + 1])));
    }
    return fold_each<2 * kStep>(half, op);
  }
}
// The same for `count` vectors, which become whole vectors at `to`.
template <typename Op>
FT_INLINE void fold_rows(const Vec* v, int64_t count, float* to, const Op& op) {
  for (int64_t i = 0; i < count; i += kWidth) {
    UVec block[kWidth];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kWidth; ++j) block[j] = as<UVec>(v[i + j < count ? i + j : count - 1]);
    store(to + i, fold_each(block, op));
  }
}

}  // namespace ft::FT_ISA
