// The gradients of weights and biases: sums over all rows (tokens), a chunk of rows at a time.
#pragma once
#include <algorithm>

#include "epilogue.h"
#include "scratch.h"

namespace ft::FT_ISA {

// Rows [begin, begin + rows) of a matrix, numbered anew.
template <typename T>
RowsView rows_from(const RowsView& v, int64_t begin) {
  return v ? RowsView{row<T>(v, begin), {v.stride[0]}} : v;
}

// Calls `f(begin, rows)` for chunks of the rows, at most `most` each and about equal.
template <typename D, typename F>
void for_chunks(int64_t rows, int64_t most, const F& f) {
  const int64_t chunks = std::max<int64_t>(1, ceil_div(rows, most));
  const int64_t each = round_up(ceil_div(rows, chunks), D::kTileRows);
  int64_t begin = 0;
  do {
    f(begin, std::min(each, rows - begin));
    begin += each;
  } while (begin < rows);
}

// dw (n, k) = sum over rows of dy (rows, n) times x (rows, k), or its transpose where dw lies so.
// Absent where dw is.
template <typename T>
class WeightGradient {
 public:
  WeightGradient(const MatrixView& dw, int64_t n, int64_t k, bool one_chunk)
      : dw_(dw),
        n_(n),
        k_(k),
        scratch_(Scratch::bytes<float>(floats(one_chunk))),
        sum_{dw.data, {dw.stride[0]}} {
    if (floats(one_chunk) > 0) {
      sum_ = {scratch_.take<float>(floats(one_chunk)), {dw.transposed ? n : k}};
    }
  }
  // x as it meets several dy, where dw is not transposed.
  template <typename Dy>
  void add(const Parallel& parallel, const RowsView& dy, const Right<Dot<T>>& x, int64_t rows,
           bool first, bool last) {
    if (!dw_) return;
    matmul(parallel, {n_, k_, rows}, rows_along_m<Dot<T>, Dy>(dy), x,
           Accumulated<T>{dw_, sum_, first, last});
  }
  // Dy and X are the element types of dy and x.
  template <typename Dy, typename X>
  void add(const Parallel& parallel, const RowsView& dy, const RowsView& x, int64_t rows,
           bool first, bool last) {
    using D = Dot<T>;
    if (!dw_) return;
    const Accumulated<T> finish{dw_, sum_, first, last};
    if (dw_.transposed) {
      matmul(parallel, {k_, n_, rows}, rows_along_m<D, X>(x), columns_along_n<D, Dy>(dy), finish);
    } else {
      matmul(parallel, {n_, k_, rows}, rows_along_m<D, Dy>(dy), columns_along_n<D, X>(x), finish);
    }
  }

 private:
  // float sums that cannot live in dw itself
  int64_t floats(bool one_chunk) const {
    return dw_ && !one_chunk && !std::is_same_v<T, float> ? n_ * k_ : 0;
  }
  const MatrixView dw_;
  const int64_t n_, k_;
  Scratch scratch_;
  RowsView sum_;
};

// db (n) = sum over rows of dy (rows, n). Absent where db is null.
template <typename T>
class BiasGradient {
 public:
  BiasGradient(void* db, int64_t n)
      : db_(static_cast<T*>(db)),
        n_(n),
        scratch_(Scratch::bytes<float>(db ? n : 0)),
        sum_(scratch_.take<float>(db ? n : 0)) {}
  template <typename Dy>
  void add(const Parallel& parallel, const RowsView& dy, int64_t rows, bool first, bool last) {
    if (!db_) return;
    for_units(parallel, ceil_div(n_, kUnitCols), [&](Units& units) {
      for (int64_t unit; units.next(unit);) {
        const int64_t end = std::min(n_, (unit + 1) * kUnitCols);
        for (int64_t j = unit * kUnitCols; j < end; j += kWidth) {
          const int64_t left = n_ - j;
          Vec total = first ? zero() : load(sum_ + j, left);
          for (int64_t r = 0; r < rows; r += kOuterRows) {
            Vec sum = zero();
            const int64_t stop = std::min(rows, r + kOuterRows);
            for (int64_t i = r; i < stop; i += kInnerRows) {
              sum += column_sum<Dy>(dy, i, std::min(stop, i + kInnerRows), j, left);
            }
            total += sum;
          }
          if (last) {
            store(db_ + j, total, left);
          } else {
            store(sum_ + j, total, left);
          }
        }
      }
    });
  }

 private:
  static constexpr int64_t kUnitCols = 128;
  // Sums of sums of sums: the rounding error grows with the number of terms on each level.
  static constexpr int64_t kInnerRows = 16, kOuterRows = 256;

  template <typename Dy>
  static FT_INLINE Vec column_sum(const RowsView& dy, int64_t begin, int64_t end, int64_t col,
                                  int64_t left) {
    Vec sum = zero();
    for (int64_t i = begin; i < end; ++i) sum += load(row<Dy>(dy, i) + col, left);
    return sum;
  }

  T* const db_;
  const int64_t n_;
  Scratch scratch_;
  float* const sum_;
};

}  // namespace ft::FT_ISA
