// C = A B of whole matrices, and what is done to C before it is stored.
//
//   C[m][n] = sum over k of A[m][k] * B[k][n]      then `finish` gets it, a tile at a time, in
//   float
//
// Both operands may lie in memory either way round and in any storage type. Each element of C is
// summed in the same order whatever the other sizes, the number of threads and the cut into units
// are: blocks of kSumLanes lanes from zero, added up in order of k. (Few rows are the exception,
// see dots.h: another order, again the same for every number of threads.)
#pragma once
#include <span>

#include "dots.h"
#include "parallel.h"
#include "scratch.h"
#include "streamed_rows.h"

namespace ft::FT_ISA {

// A as rows that are contiguous along k (activations), or along m (for weight gradients).
template <typename D>
struct Left {
  using Lane = typename D::Lane;
  const void* data;
  int64_t ld;
  // Rows [m, m + rows) of elements [k, k + count) as rows of lanes, or as the strips of
  // pack_columns; absent where the rows in memory are rows of lanes as they stand.
  void (*pack)(const Left& a, int64_t m, int64_t rows, int64_t k, int64_t count, Lane* dst);
  bool strips;

  // The first of D::kTileRows rows at m of the lanes from l, in place.
  LanesA<Lane> in_place(int64_t m, int64_t l) const {
    const int64_t stride = ld / D::kPerLane;
    return {static_cast<const Lane*>(data) + m * stride + l, stride, 1};
  }
};

// B as rows that are contiguous along k (an nn.Linear's weight), or along n.
template <typename D>
struct Right {
  using Lane = typename D::Lane;
  const void* data;
  int64_t ld;
  // Panels of columns [n, n + cols) of elements [k, k + count).
  void (*pack)(const Right& b, int64_t n, int64_t cols, int64_t k, int64_t count, Lane* panels);
  // Few rows of lanes times columns [n, n + cols) of elements [at, at + k), at rows of c that are
  // `ldc` apart. Along k: see dots.h; at most kTileCols columns. Along n: see streamed_rows.h.
  void (*few)(const Right& b, const Lane* x, int64_t x_ld, int64_t rows, int64_t n, int64_t cols,
              int64_t at, int64_t k, float* c, int64_t ldc);
  bool streamed;
  bool in_lanes;  // columns in memory are lanes as they stand
  // Where B is not streamed: the elements of column n.
  const void* (*column)(const Right& b, int64_t n) = nullptr;
  // All of B as panels, where somebody has packed it already: see Packed.
  const Lane* panels = nullptr;
};

template <typename D, typename T>
Left<D> rows_along_k(const RowsView& a, int64_t k) {
  const int64_t ld = a.stride[0];
  if (rows_are_lanes<D>(static_cast<const T*>(a.data), ld, k)) return {a.data, ld, nullptr, false};
  return {a.data, ld,
          [](const Left<D>& a, int64_t m, int64_t rows, int64_t k, int64_t count,
             typename D::Lane* dst) {
            pack_rows<D>(static_cast<const T*>(a.data) + m * a.ld + k, a.ld, rows, count, dst,
                         lanes<D>(count));
          },
          false};
}
template <typename D, typename T>
Left<D> rows_along_m(const RowsView& a) {
  return {a.data, a.stride[0],
          [](const Left<D>& a, int64_t m, int64_t rows, int64_t k, int64_t count,
             typename D::Lane* dst) {
            pack_columns<D>(static_cast<const T*>(a.data) + k * a.ld + m, a.ld, rows, count, dst);
          },
          true};
}
template <typename D, typename T>
Right<D> columns_along_k(const RowsView& b) {
  return {b.data,
          b.stride[0],
          [](const Right<D>& b, int64_t n, int64_t cols, int64_t k, int64_t count,
             typename D::Lane* panels) {
            pack_transposed<D>(static_cast<const T*>(b.data) + n * b.ld + k, b.ld, cols, count,
                               panels);
          },
          [](const Right<D>& b, const typename D::Lane* x, int64_t x_ld, int64_t rows, int64_t n,
             int64_t cols, int64_t at, int64_t k, float* c, int64_t) {
            dots<D>(x + at / D::kPerLane, x_ld, rows, static_cast<const T*>(b.data) + n * b.ld + at,
                    b.ld, cols, k, c);
          },
          false,
          std::is_same_v<T, bf16> && D::kPerLane == 2,
          [](const Right<D>& b, int64_t n) -> const void* {
            return static_cast<const T*>(b.data) + n * b.ld;
          }};
}
template <typename D, typename T>
Right<D> columns_along_n(const RowsView& b) {
  return {b.data,
          b.stride[0],
          [](const Right<D>& b, int64_t n, int64_t cols, int64_t k, int64_t count,
             typename D::Lane* panels) {
            pack_natural<D>(static_cast<const T*>(b.data) + k * b.ld + n, b.ld, cols, count,
                            panels);
          },
          [](const Right<D>& b, const typename D::Lane* x, int64_t x_ld, int64_t rows, int64_t n,
             int64_t cols, int64_t at, int64_t k, float* c, int64_t ldc) {
            stream_rows<D>(x + at / D::kPerLane, x_ld, rows,
                           static_cast<const T*>(b.data) + at * b.ld + n, b.ld, cols, k, c, ldc);
          },
          true,
          false};
}
// Rows up to which reading B in place is faster than packing it: along k (measured on Zen 5), and
// along n, see streamed_rows.h. The matrix unit makes up for packing sooner, unless it takes the
// few rows itself, see few_rows_amx.h (Sapphire Rapids).
template <typename D>
int64_t most_few_rows(const Right<D>& b) {
  if (!b.few) return 0;
  if (D::kInMatrixUnit) return b.in_lanes ? 64 : b.streamed ? 4 : 2;
  return b.streamed ? 12 : 16;
}

// A weight W (out, in) as the B of x Wᵀ, and as that of dy W.
template <typename D, typename T>
Right<D> transpose_of(const MatrixView& w) {
  return w.transposed ? columns_along_n<D, T>(w) : columns_along_k<D, T>(w);
}
template <typename D, typename T>
Right<D> itself(const MatrixView& w) {
  return w.transposed ? columns_along_k<D, T>(w) : columns_along_n<D, T>(w);
}

// Of a B that is packed as a whole: a share of the last level of cache, and of the scratch that a
// thread keeps.
inline constexpr int64_t kPackedBytes = int64_t{16} << 20;

// Columns [first, first + n) of B, a multiple of kTileCols from 0 on; panels `stride` lanes apart.
template <typename D>
void pack_panels(const Parallel& parallel, const Right<D>& b, int64_t first, int64_t n, int64_t k,
                 typename D::Lane* to, int64_t stride);  // matmul.cpp

// B packed once, for several products of `m` rows each (a last one of few rows reads B itself).
// Where that many rows would not be worth it, or B is large, it stays as it is.
template <typename D>
class Packed {
  using Lane = typename D::Lane;

 public:
  Packed(const Parallel& parallel, const Right<D>& b, int64_t n, int64_t k, int64_t m,
         int64_t products);
  const Right<D>& operator*() const { return b_; }

 private:
  static constexpr int64_t kMost = kPackedBytes / sizeof(Lane);
  Right<D> b_;
  int64_t lanes_;
  Scratch scratch_;
};

// A finished tile of C: `rows` <= D::kTileRows rows from `row` on, `cols` <= kTileCols columns from
// `col` on, a multiple of kTileCols. Whole vectors may be read; columns past the last are zero.
struct Tile {
  int64_t row, rows, col, cols;
  const float* c;
  int64_t ldc;
};
struct Finish {
  const void* context;
  void (*call)(const void* context, const Tile& tile);
};
template <typename F>
Finish finish_of(const F& f) {
  return {&f, [](const void* f, const Tile& tile) { (*static_cast<const F*>(f))(tile); }};
}

// A product over k elements, of which C may be a sum: C = A1 B1 + A2 B2 + …
template <typename D>
struct Product {
  Left<D> a;
  Right<D> b;
  int64_t k;
};
// Rows and columns of C. `of`: the rows of the matrix that these m are a chunk of, where they are:
// all its chunks are summed in one order then, that of many rows or that of few.
struct Size {
  int64_t m, n, k;
  int64_t of = 0;
};
template <typename D>
void matmul(const Parallel& parallel, const Size& size, std::span<const Product<D>> sum,
            const Finish& finish);  // matmul.cpp; size.k is not read

// `finish` is called with every tile once, from many threads.
template <typename D, typename F>
void matmul(const Parallel& parallel, const Size& size, std::span<const Product<D>> sum,
            const F& finish) {
  matmul(parallel, size, sum, finish_of(finish));
}
template <typename D, typename F>
void matmul(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
            const F& finish) {
  const Product<D> product{a, b, size.k};
  matmul(parallel, size, std::span<const Product<D>>(&product, 1), finish);
}

}  // namespace ft::FT_ISA
