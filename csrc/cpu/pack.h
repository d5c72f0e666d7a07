// Rearranges operands into what the tile of gemm.h streams: panels for B, rows of lanes for A.
// Packing converts the storage type, pads with zeros, and happens a block at a time in cache, so
// kernels never copy a whole tensor.
#pragma once
#include <type_traits>
#include <utility>

#include "gemm.h"
#include "transpose.h"

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
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, int8_t>) {  // all of int8 is exact in bf16
      const Vec low = load(p, left < 0 ? 0 : left);
      const Vec high = load(p + kWidth, left < kWidth ? 0 : left - kWidth);
      return (UVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
#endif
    if (left >= 2 * kWidth) return load_bits<UVec>(p);
#if defined(__AVX512BW__)
    const auto mask = static_cast<__mmask32>(left > 0 ? (uint32_t{1} << left) - 1 : 0);
    return (UVec)_mm512_maskz_loadu_epi16(mask, p);
#else
    UVec v{};
    if (left > 0) std::memcpy(&v, p, left * sizeof(T));
    return v;
#endif
  }
}

// B from rows that are contiguous along k: src[n * ld + k] -> panels of n. This is Kᵀ of attention
// and the (out, in) weight of nn.Linear. Rows up to the next kWidth come out as zeros; what is
// behind them in the last panel is not written, since nothing reads it.
template <typename D, typename T>
void pack_transposed(const T* src, int64_t ld, int64_t n, int64_t k, typename D::Lane* panels) {
  const int64_t depth = lanes<D>(k);
  for (int64_t n0 = 0; n0 < n; n0 += kTileCols, panels += panel_size<D>(k)) {
    for (int64_t j = 0; j < kTileCols && n0 + j < n; j += kWidth) {
      const int64_t rows = n - n0 - j;
      for (int64_t l = 0; l < depth; l += kWidth) {
        const int64_t at = l * D::kPerLane;
        UVec block[kWidth];
        if (rows >= kWidth && k - at >= kWidth * D::kPerLane) {
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) {
            block[r] = load_row_lanes<D>(src + (n0 + j + r) * ld + at, kWidth * D::kPerLane);
          }
        } else {
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) {
            block[r] = r < rows ? load_row_lanes<D>(src + (n0 + j + r) * ld + at, k - at) : UVec{};
          }
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

// kWidth lanes of neighbouring columns: element (l, j) of rows that are contiguous along j, `left`
// of them there. A lane of two holds rows p and p + ld, or p and a zero without a `second` row.
template <typename D, typename T>
FT_INLINE UVec load_column_lanes(const T* p, int64_t ld, bool second, int64_t left) {
  if (left <= 0) return UVec{};
  if constexpr (D::kPerLane == 1) {
    return as<UVec>(load(p, left));
  } else {  // a bf16 is the upper half of its float
    const UVec low = as<UVec>(load(p, left)) >> 16;
    return second ? low | as<UVec>(load(p + ld, left)) : low;
  }
}

// The same of a whole pair of vectors, with both rows there.
template <typename D, typename T>
FT_INLINE void load_column_pair(const T* p, int64_t ld, UVec& low, UVec& high) {
#if defined(__AVX512BW__)
  if constexpr (D::kPerLane == 2) {
    const auto order = [](int first) {
      HPair v;
      for (int i = 0; i < kWidth; ++i) v[2 * i] = first + i, v[2 * i + 1] = 2 * kWidth + first + i;
      return (__m512i)v;
    };
    const auto one = load_bits<__m512i>(p), two = load_bits<__m512i>(p + ld);
    low = (UVec)_mm512_permutex2var_epi16(one, order(0), two);
    high = (UVec)_mm512_permutex2var_epi16(one, order(kWidth), two);
    return;
  }
#endif
  low = load_column_lanes<D>(p, ld, true, kWidth);
  high = load_column_lanes<D>(p + kWidth, ld, true, kWidth);
}

// B from rows that are contiguous along n: src[k * ld + n] -> panels of n. This is V of attention,
// and both operands of a weight gradient.
template <typename D, typename T>
void pack_natural(const T* src, int64_t ld, int64_t n, int64_t k, typename D::Lane* panels) {
  const int64_t depth = lanes<D>(k);
  for (int64_t n0 = 0; n0 < n; n0 += kTileCols, panels += panel_size<D>(k)) {
    const bool whole = n - n0 >= kTileCols;
    for (int64_t l = 0; l < depth; ++l) {
      const T* from = src + l * D::kPerLane * ld + n0;
      typename D::Lane* to = panels + l * kTileCols;
      const bool second = l * D::kPerLane + 1 < k;
      if (whole && (D::kPerLane == 1 || second)) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < kTileCols; j += 2 * kWidth) {
          UVec low, high;
          load_column_pair<D>(from + j, ld, low, high);
          store_bits(to + j, low);
          store_bits(to + j + kWidth, high);
        }
        continue;
      }
      for (int64_t j = 0; j < kTileCols && n0 + j < n; j += kWidth) {
        store_bits(to + j, load_column_lanes<D>(from + j, ld, second, n - n0 - j));
      }
    }
  }
}

// Element `row` of all columns becomes zero, in panels of n columns of k.
template <typename D>
void clear_row(typename D::Lane* panels, int64_t n, int64_t k, int64_t row) {
  using Lane = typename D::Lane;
  for (int64_t n0 = 0; n0 < n; n0 += kTileCols, panels += panel_size<D>(k)) {
    Lane* at = panels + row / D::kPerLane * kTileCols;
    for (int64_t j = 0; j < kTileCols; ++j) {
      if constexpr (D::kPerLane == 1) {
        at[j] = 0;
      } else {
        at[j] &= row % 2 ? 0x0000ffffu : 0xffff0000u;
      }
    }
  }
}

// A from rows that are contiguous along m: src[k * ld + m] -> strips of D::kTileRows, kStripLanes
// lanes for each k, so that a tile reads one cache line after the other: strip s, lane (m, k) is at
// dst[(s * depth + k) * kStripLanes + m]. This is the other operand of a weight gradient.
inline constexpr int kStripLanes = 8;

// The matrix unit reads rows of lanes instead: lane (m, k) is at dst[m * depth + k].

// Lanes that m columns take, and where the strip lies that starts at column m.
template <typename D>
constexpr int64_t packed_columns(int64_t m, int64_t depth) {
  if (D::kInMatrixUnit) return (m + kWidth - 1) / kWidth * kWidth * depth;
  return (m + D::kTileRows - 1) / D::kTileRows * depth * kStripLanes;
}
template <typename D>
FT_INLINE LanesA<typename D::Lane> packed_strip(const typename D::Lane* packed, int64_t m,
                                                int64_t depth) {
  if (D::kInMatrixUnit) return {packed + m * depth, depth, 1};
  return {packed + m / D::kTileRows * depth * kStripLanes, 1, kStripLanes};
}
template <typename D, typename T>
void pack_columns_as_strips(const T* src, int64_t ld, int64_t m, int64_t k, typename D::Lane* dst) {
  constexpr int kTileRows = D::kTileRows;
  static_assert(kTileRows <= kStripLanes);
  constexpr int64_t kDepth = 16, kCols = kTileRows * kWidth;  // a block that stays in L1
  typename D::Lane block[kDepth][kCols + kStripLanes];
  const int64_t depth = lanes<D>(k);
  for (int64_t m0 = 0; m0 < m; m0 += kCols) {
    const int64_t strips = (m - m0 < kCols ? m - m0 + kTileRows - 1 : kCols) / kTileRows;
    for (int64_t l0 = 0; l0 < depth; l0 += kDepth) {
      const int64_t rows = depth - l0 < kDepth ? depth - l0 : kDepth;
      for (int64_t l = 0; l < rows; ++l) {
        const int64_t at = (l0 + l) * D::kPerLane;
        for (int64_t j = 0; j < kCols; j += kWidth) {
          store_bits(&block[l][j],
                     load_column_lanes<D>(src + at * ld + m0 + j, ld, at + 1 < k, m - m0 - j));
        }
      }
      for (int64_t s = 0; s < strips; ++s) {
        typename D::Lane* to = dst + ((m0 / kTileRows + s) * depth + l0) * kStripLanes;
        for (int64_t l = 0; l < rows; ++l) {
          std::memcpy(to + l * kStripLanes, &block[l][s * kTileRows],
                      kStripLanes * sizeof(typename D::Lane));
        }
      }
    }
  }
}
template <typename D, typename T>
void pack_columns_as_rows(const T* src, int64_t ld, int64_t m, int64_t k, typename D::Lane* dst) {
  const int64_t depth = lanes<D>(k);
  const auto turn = [&](UVec(&block)[kWidth], int64_t m0, int64_t l0) {
    transpose(block);
    const int64_t count = depth - l0 < kWidth ? depth - l0 : kWidth;
    for (int64_t i = 0; i < kWidth; ++i) {
      typename D::Lane* to = dst + (m0 + i) * depth + l0;
      if (count == kWidth) {
        store_bits(to, block[i]);
      } else {
        std::memcpy(to, &block[i], count * sizeof(typename D::Lane));
      }
    }
  };
  for (int64_t m0 = 0; m0 < m; m0 += 2 * kWidth) {
    for (int64_t l0 = 0; l0 < depth; l0 += kWidth) {
      UVec low[kWidth], high[kWidth];
      const T* from = src + l0 * D::kPerLane * ld + m0;
      if (m - m0 >= 2 * kWidth && (l0 + kWidth) * D::kPerLane <= k) {
#pragma GCC unroll 16
        for (int l = 0; l < kWidth; ++l) {
          load_column_pair<D>(from + l * D::kPerLane * ld, ld, low[l], high[l]);
        }
      } else {
        for (int l = 0; l < kWidth; ++l) {
          const int64_t at = (l0 + l) * D::kPerLane;
          const auto load = [&](int64_t j) {
            if (at >= k) return UVec{};
            return load_column_lanes<D>(src + at * ld + j, ld, at + 1 < k, m - j);
          };
          low[l] = load(m0);
          high[l] = load(m0 + kWidth);
        }
      }
      turn(low, m0, l0);
      if (m0 + kWidth < m) turn(high, m0 + kWidth, l0);
    }
  }
}
template <typename D, typename T>
void pack_columns(const T* src, int64_t ld, int64_t m, int64_t k, typename D::Lane* dst) {
  if constexpr (D::kInMatrixUnit) {
    pack_columns_as_rows<D>(src, ld, m, k, dst);
  } else {
    pack_columns_as_strips<D>(src, ld, m, k, dst);
  }
}

// A as rows of lanes, `dst_ld` lanes apart, from rows that are contiguous along k.
template <typename D, typename T>
void pack_rows(const T* src, int64_t ld, int64_t rows, int64_t k, typename D::Lane* dst,
               int64_t dst_ld) {
  const int64_t depth = lanes<D>(k), whole = k / (kWidth * D::kPerLane) * kWidth;
  for (int64_t r = 0; r < rows; ++r, src += ld, dst += dst_ld) {
    for (int64_t l = 0; l < whole; l += kWidth) {
      store_bits(dst + l, load_row_lanes<D>(src + l * D::kPerLane, kWidth * D::kPerLane));
    }
    if (whole < depth) {
      const UVec v = load_row_lanes<D>(src + whole * D::kPerLane, k - whole * D::kPerLane);
      std::memcpy(dst + whole, &v, (depth - whole) * sizeof(typename D::Lane));
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
