// Several weights (out, in) that meet the same rows as one B, so that one product reads x once.
//
// Their columns are put side by side when panels are packed; no weight is copied as a whole. A
// panel that a weight does not fill is zero behind it.
#pragma once
#include <cstring>

#include "matmul.h"

namespace ft::FT_ISA {

// Two of equal size, half a panel of each in turn: columns [0, kHalf) of a tile of C belong to the
// first and the rest to the second, for the same features. What needs both has them in one tile.
template <typename T>
struct PairedWeights {
  static constexpr int64_t kHalf = kTileCols / 2;
  RowsView weight[2];
  int64_t features;

  int64_t columns() const { return ceil_div(features, kHalf) * kTileCols; }
  // Whether the panel at n is full.
  bool fills(int64_t n) const { return features - n / 2 >= kHalf; }
  // Calls f(rows of a weight, their stride, how many, column in the panel) for each half of it.
  template <typename F>
  void each(int64_t n, const F& f) const {
    const int64_t at = n / 2, count = std::min(kHalf, features - at);
    for (int64_t i : {0, 1}) f(row<T>(weight[i], at), weight[i].stride[0], count, i * kHalf);
  }
};

// Three, each from a panel of its own on.
template <typename T>
struct JoinedWeights {
  static constexpr int kWeights = 3;
  RowsView weight[kWeights];
  int64_t features[kWeights];

  int64_t columns() const {
    int64_t all = 0;
    for (int64_t n : features) all += panels(n) * kTileCols;
    return all;
  }
  struct Place {
    int weight;
    int64_t column, count;  // of the weight; count: in a panel
  };
  Place place(int64_t n) const {
    int i = 0;
    for (; i + 1 < kWeights && n >= panels(features[i]) * kTileCols; ++i) {
      n -= panels(features[i]) * kTileCols;
    }
    return {i, n, std::min<int64_t>(kTileCols, features[i] - n)};
  }
  bool fills(int64_t n) const { return place(n).count == kTileCols; }
  template <typename F>
  void each(int64_t n, const F& f) const {
    const Place p = place(n);
    f(row<T>(weight[p.weight], p.column), weight[p.weight].stride[0], p.count, 0);
  }
};

// They as one B of `columns()` columns; `weights` outlives it.
template <typename D, typename T, typename Weights>
Right<D> columns_of(const Weights& weights) {
  using Lane = typename D::Lane;
  return {&weights,
          0,
          [](const Right<D>& b, int64_t n, int64_t cols, int64_t k, int64_t count, Lane* panels) {
            for (int64_t end = n + cols; n < end; n += kTileCols, panels += panel_size<D>(count)) {
              const auto& weights = *static_cast<const Weights*>(b.data);
              if (!weights.fills(n)) {
                std::memset(panels, 0, panel_size<D>(count) * sizeof(Lane));
              }
              weights.each(n, [&](const T* rows, int64_t ld, int64_t some, int64_t at) {
                pack_transposed<D>(rows + k, ld, some, count, panels + at);
              });
            }
          },
          [](const Right<D>& b, const Lane* x, int64_t x_ld, int64_t rows, int64_t n, int64_t,
             int64_t from, int64_t k, float* c, int64_t) {
            static_cast<const Weights*>(b.data)->each(
                n, [&](const T* w, int64_t ld, int64_t some, int64_t at) {
                  dots<D>(x + from / D::kPerLane, x_ld, rows, w + from, ld, some, k, c + at);
                });
          },
          false,
          std::is_same_v<T, bf16> && D::kPerLane == 2,
          [](const Right<D>& b, int64_t n) {
            const void* found = nullptr;  // past the last column: any
            static_cast<const Weights*>(b.data)->each(
                n / kTileCols * kTileCols, [&](const T* w, int64_t ld, int64_t some, int64_t at) {
                  const int64_t column = n % kTileCols - at;
                  if (some > 0 && (column >= 0 || !found)) {
                    found = w + std::clamp<int64_t>(column, 0, some - 1) * ld;
                  }
                });
            return found;
          }};
}

}  // namespace ft::FT_ISA
