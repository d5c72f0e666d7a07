// What lies between two products: chunks of rows whose hidden features stay in cache.
#pragma once
#include <algorithm>

#include "gradients.h"
#include "scratch.h"

namespace ft::FT_ISA {

// Of all the chunk's hidden features: what a share of the last level of cache holds beside the
// weights.
inline constexpr int64_t kForwardBytes = int64_t{8} << 20;
inline constexpr int64_t kBackwardBytes = int64_t{16} << 20;

// Chunks of matrices of F hidden features, as they are kept between two products.
template <typename T>
struct Hidden {
  static constexpr int64_t kTileRows = Dot<T>::kTileRows;
  int64_t ld;    // successive rows do not start in the same cache set
  int64_t most;  // rows of a chunk

  Hidden(int64_t m, int64_t f, int64_t chunk_bytes) {
    constexpr int64_t kElement = sizeof(Kept<T>), kLine = 64 / kElement;
    ld = round_up(f, kLine) + kLine;
    most = chunk_bytes / (ld * kElement) / kTileRows * kTileRows;
    most = std::max(kTileRows, std::min(round_up(m, kTileRows), most));
  }
  int64_t elements() const { return most * ld; }
  size_t bytes() const { return Scratch::bytes<Kept<T>>(elements()); }
  RowsView take(Scratch& scratch) const { return {scratch.take<Kept<T>>(elements()), {ld}}; }
};

// The same of T itself: pre-activations that backward makes again.
template <typename T>
struct Remade {
  int64_t ld, most;

  template <typename Kind>
  Remade(const Hidden<Kind>& hidden, bool wanted) : ld(hidden.ld), most(wanted ? hidden.most : 0) {}
  size_t bytes() const { return Scratch::bytes<T>(most * ld); }
  RowsView take(Scratch& scratch) const {
    return most ? RowsView{scratch.take<T>(most * ld), {ld}} : RowsView{};
  }
};

// Calls `f` with every tile of a chunk, without a product: nothing in front of it needs a gradient.
template <typename T, typename F>
void for_tiles(const Parallel& parallel, int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t kTileRows = Dot<T>::kTileRows;
  for_units(parallel, ceil_div(rows, kTileRows), [&](Units& units) {
    for (int64_t i; units.next(i);) {
      const int64_t r = i * kTileRows;
      for (int64_t n = 0; n < columns; n += kTileCols) {
        f(Tile{r, std::min(kTileRows, rows - r), n, std::min<int64_t>(kTileCols, columns - n),
               nullptr, 0});
      }
    }
  });
}

// The forward pass of p, whose two weights are w1 and w2, each with the scales of its outputs where
// it is of int8.
template <typename T>
void two_layers(const MlpParams& p, const Parallel& parallel, const Hidden<T>& kept,
                const Right<Dot<T>>& w1, const Right<Dot<T>>& w2, const float* scale1 = nullptr,
                const float* scale2 = nullptr) {
  using D = Dot<T>;
  Scratch scratch(kept.bytes());
  const RowsView hidden = kept.take(scratch);
  const T *b1 = static_cast<const T*>(p.b1), *b2 = static_cast<const T*>(p.b2);
  for_chunks<D>(p.m, kept.most, [&](int64_t begin, int64_t rows) {
    matmul(parallel, {rows, p.f, p.k, p.m}, rows_along_k<D, T>(rows_from<T>(p.x, begin), p.k), w1,
           Activated<T, Kept<T>>{p.activation, b1, rows_from<T>(p.pre, begin), hidden, p.dropout,
                                 begin, scale1});
    matmul(parallel, {rows, p.n, p.f, p.m}, rows_along_k<D, Kept<T>>(hidden, p.f), w2,
           Activated<T, T>{Activation::kIdentity, b2, {}, rows_from<T>(p.y, begin), {}, 0, scale2});
  });
}

}  // namespace ft::FT_ISA
