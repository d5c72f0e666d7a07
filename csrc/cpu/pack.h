// Rearranges operands into what the tile of gemm.h streams: panels for B, rows of lanes for A.
// Packing converts the storage type, pads with zeros, and happens a block at a time in cache, so
// kernels never copy a whole tensor.
#pragma once
#include <type_traits>
#include <utility>

#include "gemm.h"

namespace ft::FT_ISA {

template <typename D>
constexpr int64_t lanes(int64_t k) {
  return (k + D::kPerLane - 1) / D::kPerLane;
}
// Lanes between two panels of an operand with k rows.
template <typename D>
constexpr int64_t panel_size(int64_t k) {
  return lanes<D>(k) * kTileCols;
}

// kWidth lanes along a contiguous row; `left` elements exist, lanes past them are zero.
template <typename D, typename T>
FT_INLINE UVec load_row_lanes(const T* p, int64_t left) {
  if constexpr (D::kPerLane == 1) {
    return as<UVec>(load(p, left < 0 ? 0 : left));
  } else {
    static_assert(sizeof(T) == 2);
    if (left >= 2 * kWidth) return load_bits<UVec>(p);
    UVec v{};
    if (left > 0) std::memcpy(&v, p, left * sizeof(T));
    return v;
  }
}

// One butterfly of a register transpose: swaps the off-diagonal kStep x kStep blocks.
template <int kStep, int... kLane>
FT_INLINE void swap_blocks(UVec& a, UVec& b, std::integer_sequence<int, kLane...>) {
  const UVec low = __builtin_shufflevector(
      a, b, ((kLane & kStep) ? kWidth + kLane - kStep : kLane)...);
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

// B from rows that are contiguous along k: src[n * ld + k] -> panels of n. This is Kᵀ of attention
// and the (out, in) weight of nn.Linear. Rows n…(end of the last panel) come out as zeros.
template <typename D, typename T>
void pack_transposed(const T* src, int64_t ld, int64_t n, int64_t k, typename D::Lane* panels) {
  const int64_t depth = lanes<D>(k);
  for (int64_t n0 = 0; n0 < n; n0 += kTileCols, panels += panel_size<D>(k)) {
    for (int64_t j = 0; j < kTileCols; j += kWidth) {
      const int64_t rows = n - n0 - j;
      for (int64_t l = 0; l < depth; l += kWidth) {
        UVec block[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) {
          const int64_t at = l * D::kPerLane;
          block[r] =
              r < rows ? load_row_lanes<D>(src + (n0 + j + r) * ld + at, k - at) : UVec{};
        }
        transpose(block);
        const int64_t count = depth - l < kWidth ? depth - l : kWidth;
        for (int64_t i = 0; i < count; ++i) {
          store_bits(panels + (l + i) * kTileCols + j, block[i]);
        }
      }
    }
  }
}

// B from rows that are contiguous along n: src[k * ld + n] -> panels of n. This is V of attention,
// and both operands of a weight gradient.
template <typename D, typename T>
void pack_natural(const T* src, int64_t ld, int64_t n, int64_t k, typename D::Lane* panels) {
  const int64_t depth = lanes<D>(k);
  for (int64_t n0 = 0; n0 < n; n0 += kTileCols, panels += panel_size<D>(k)) {
    for (int64_t l = 0; l < depth; ++l) {
      const T* from = src + l * D::kPerLane * ld + n0;
      for (int64_t j = 0; j < kTileCols; j += kWidth) {
        const int64_t left = n - n0 - j < 0 ? 0 : n - n0 - j;
        typename D::Lane* to = panels + l * kTileCols + j;
        if constexpr (D::kPerLane == 1) {
          store(to, left > 0 ? load(from + j, left) : zero());
        } else {
          auto bits = [&](const T* p) {  // a bf16 is the upper half of its float
            return left > 0 ? as<UVec>(load(p, left)) : UVec{};
          };
          const bool second = (l * D::kPerLane + 1) < k;
          store_bits(to, (bits(from + j) >> 16) | (second ? bits(from + ld + j) : UVec{}));
        }
      }
    }
  }
}

// A as rows of lanes, `dst_ld` lanes apart, from rows that are contiguous along k.
template <typename D, typename T>
void pack_rows(const T* src, int64_t ld, int64_t rows, int64_t k, typename D::Lane* dst,
               int64_t dst_ld) {
  const int64_t depth = lanes<D>(k);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t l = 0; l < depth; l += kWidth) {
      const int64_t at = l * D::kPerLane;
      const UVec v = load_row_lanes<D>(src + r * ld + at, k - at);
      if (depth - l >= kWidth) {
        store_bits(dst + r * dst_ld + l, v);
      } else {
        std::memcpy(dst + r * dst_ld + l, &v, (depth - l) * sizeof(typename D::Lane));
      }
    }
  }
}

// Whether rows in memory already are rows of lanes.
template <typename D, typename T>
bool rows_are_lanes(const T* src, int64_t ld, int64_t k) {
  if constexpr (std::is_same_v<T, typename D::Lane>) return true;
  if constexpr (D::kPerLane == 2) {
    return k % 2 == 0 && ld % 2 == 0 && reinterpret_cast<uintptr_t>(src) % 4 == 0;
  }
  return false;
}

}  // namespace ft::FT_ISA
