// What becomes of a tile of C in linear_act and mlp: bias, activation, dropout, gradient, storage.
//
// It happens on the float sums while they are in L1, so the matrices between the products are
// written once, in their storage type, and never read back for an elementwise pass.
#pragma once
#include "activation.h"
#include "dropout.h"
#include "matmul.h"

namespace ft::FT_ISA {

// How a matrix between two products is kept: as the lanes that the next product reads.
template <typename T>
using Kept = std::conditional_t<Dot<T>::kPerLane == 2, T, float>;

// A row of a tile: `make(j, left)` is its vector at column j, with `left` columns to come. One
// branch for all of a row, so that a whole one stays in registers.
template <typename T, typename Make>
FT_INLINE void store_row(T* to, int64_t cols, const Make& make) {
  if (cols == kTileCols) {
    Vec v[kTileVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kTileVecs; ++i) v[i] = make(i * kWidth, int64_t{kWidth});
#pragma GCC unroll 4
    for (int i = 0; i < kTileVecs; i += 2) store_pair(to + i * kWidth, v[i], v[i + 1]);
  } else {
    for (int64_t j = 0; j < cols; j += kWidth) store(to + j, make(j, cols - j), cols - j);
  }
}

// The draws of a tile's elements: column = feature, row = row of x, of which the chunk at hand
// starts at `first_row`.
class TileDraws {
 public:
  TileDraws(const Dropout& dropout, int64_t first_row, const Tile& t) : dropout_(dropout) {
    if (!dropout.active()) return;
    for (int64_t r = 0; r < t.rows; ++r) {
      draw_row(dropout.seed, t.col, t.col + t.cols, first_row + t.row + r, 0, 0, draws_[r]);
    }
  }
  // Of a tile whose dropout is active.
  FT_INLINE Vec drop(Vec v, int64_t row, int64_t col) const {
    return FT_ISA::drop(v, draws_[row] + col, dropout_.threshold, dropout_.scale);
  }

 private:
  const Dropout& dropout_;
  uint16_t draws_[kMostTileRows][draw_space(kTileCols)];
};

// The two that follow work on copies of what they know of the tile: stores could change the members
// behind a pointer, as far as the compiler can tell, and it would load them anew for every vector.

// out = dropout(act(C + bias)), and C + bias itself where it is asked for.
template <typename T, typename Out>
struct Activated {
  Activation activation;
  const T* bias;
  RowsView pre, out;  // of T, of Out
  Dropout dropout;
  int64_t first_row;
  const float* scale = nullptr;  // of each column of C, where B was of int8

  void operator()(const Tile& t) const {
    const TileDraws draws(dropout, first_row, t);
    with_activation(activation, [&](auto kind) { run<kind()>(t, draws); });
  }

 private:
  template <Activation kActivation>
  void run(const Tile tile, const TileDraws& draws) const {
    const T* const b = bias ? bias + tile.col : nullptr;
    const float* const by = scale ? scale + tile.col : nullptr;
    const bool drops = dropout.active(), has_pre{pre};
    T* to_pre = has_pre ? mutable_row<T>(pre, tile.row) + tile.col : nullptr;
    Out* to = mutable_row<Out>(out, tile.row) + tile.col;
    const int64_t pre_stride = pre.stride[0], stride = out.stride[0];
    const float* c = tile.c;
    for (int64_t r = 0; r < tile.rows; ++r, c += tile.ldc, to += stride) {
      store_row(to, tile.cols, [&](int64_t j, int64_t left) __attribute__((always_inline)) {
        Vec v = load(c + j);
        if (by) v *= load(by + j, left);
        if (b) v += load(b + j, left);
        if (has_pre) store(to_pre + r * pre_stride + j, v, left);
        const Vec h = activate<kActivation, T>(v);
        return drops ? draws.drop(h, r, j) : h;
      });
    }
  }
};

// C is the gradient of h = dropout(act(pre)): dpre = dropout(C) act'(pre), and h once more. Either
// may be absent; without dpre, C is not read.
template <typename T>
struct HiddenGradient {
  Activation activation;
  RowsView pre;      // of T
  RowsView dpre, h;  // of Kept<T>
  Dropout dropout;
  int64_t first_row;

  void operator()(const Tile& t) const {
    const TileDraws draws(dropout, first_row, t);
    with_activation(activation, [&](auto kind) { run<kind()>(t, draws); });
  }

 private:
  template <Activation kActivation>
  void run(const Tile tile, const TileDraws& draws) const {
    const bool drops = dropout.active(), has_h{h}, has_dpre{dpre};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* from = row<T>(pre, tile.row + r) + tile.col;
      Kept<T>* to_h = has_h ? mutable_row<Kept<T>>(h, tile.row + r) + tile.col : nullptr;
      Kept<T>* to = has_dpre ? mutable_row<Kept<T>>(dpre, tile.row + r) + tile.col : nullptr;
      for (int64_t j = 0; j < tile.cols; j += kWidth) {
        const int64_t left = tile.cols - j;
        const ValueAndSlope h = activation_and_slope<kActivation, T>(load(from + j, left));
        if (has_h) store(to_h + j, drops ? draws.drop(h.value, r, j) : h.value, left);
        if (has_dpre) {
          const Vec v = load(tile.c + r * tile.ldc + j);
          store(to + j, (drops ? draws.drop(v, r, j) : v) * h.slope, left);
        }
      }
    }
  }
};

// C as it is.
template <typename T>
struct Stored {
  RowsView out;

  void operator()(const Tile& t) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      T* to = mutable_row<T>(out, t.row + r) + t.col;
      const float* c = t.c + r * t.ldc;
      store_row(to, t.cols,
                [&](int64_t j, int64_t) __attribute__((always_inline)) { return load(c + j); });
    }
  }
};

// A sum over several products: of floats, and in the storage type with the last one.
template <typename T>
struct Accumulated {
  RowsView out;  // of T
  RowsView sum;  // of float; not touched where one product is all
  bool first, last;

  void operator()(const Tile& t) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      float* s = first && last ? nullptr : mutable_row<float>(sum, t.row + r) + t.col;
      T* to = last ? mutable_row<T>(out, t.row + r) + t.col : nullptr;
      for (int64_t j = 0; j < t.cols; j += kWidth) {
        const int64_t left = t.cols - j;
        Vec v = load(t.c + r * t.ldc + j);
        if (!first) v += load(s + j, left);
        if (last) {
          store(to + j, v, left);
        } else {
          store(s + j, v, left);
        }
      }
    }
  }
};

}  // namespace ft::FT_ISA
