// The driver of matmul.h: units of work, packing, the sum over blocks of k.
#include "matmul.h"

#include <algorithm>

#include "scratch.h"

namespace ft::FT_ISA {
namespace {

// Lanes of a block of k: about equal ones, whole vectors. In registers a panel of them stays in L2.
// In the matrix unit it stays in L1, unless one block is all: then C never leaves the tiles.
template <typename D>
constexpr int64_t block_lanes(int64_t depth) {
  constexpr int64_t kWhole = D::kInMatrixUnit ? kSumLanes / 2 : kSumLanes;
  constexpr int64_t kMost = D::kInMatrixUnit ? kSumLanes / 3 : kSumLanes;
  if (depth <= kWhole) return depth;
  return round_up(ceil_div(depth, ceil_div(depth, kMost)), 16);
}

// Of A that is packed at a time; its kSumLanes columns stay in L2 while all panels pass. Whole
// tiles of either height.
constexpr int64_t kPackedRows = 96;

// What a unit of work computes: so many rows of C times so many panels of columns.
struct Unit {
  int64_t rows, panels;
};

// A panel costs its packing once a unit, about as much as 8 rows: many rows make that small, and C
// of them (rows x kTileCols floats a panel) still fits beside it in L2. Where A has to be packed
// too, several panels share that.
template <typename D>
Unit choose_unit(const Size& size, const Left<D>& a, int64_t threads) {
  const int64_t columns = panels(size.n);
  const Unit most = D::kInMatrixUnit ? Unit{(a.pack ? 8 : 10) * kPackedRows, 4}
                    : a.pack         ? Unit{2 * kPackedRows, 4}
                                     : Unit{10 * kPackedRows, 1};
  constexpr int64_t kUnitsPerThread = 4;
  const int64_t groups = ceil_div(columns, most.panels);
  int64_t row_blocks = ceil_div(size.m, most.rows);
  if (threads > 1) {
    const int64_t wanted = ceil_div(kUnitsPerThread * threads, groups);
    row_blocks = std::max(row_blocks, std::min(wanted, ceil_div(size.m, 2 * kPackedRows)));
  }
  return {round_up(ceil_div(size.m, row_blocks), D::kTileRows), ceil_div(columns, groups)};
}

template <typename D>
class Worker {
  using Lane = typename D::Lane;

 public:
  Worker(const Size& size, const Left<D>& a, const Right<D>& b, const Unit& unit,
         const Finish& finish)
      : size_(size),
        a_(a),
        b_(b),
        finish_(finish),
        depth_(lanes<D>(size.k)),
        block_(block_lanes<D>(depth_)),
        ldc_(unit.panels * kTileCols),
        scratch_(Scratch::bytes<Lane>(packed_lanes()) +
                 Scratch::bytes<Lane>(unit.panels * block_ * kTileCols) +
                 Scratch::bytes<float>(c_rows(unit) * ldc_)) {
    rows_ = scratch_.take<Lane>(packed_lanes());
    panels_ = scratch_.take<Lane>(unit.panels * block_ * kTileCols);
    c_ = scratch_.take<float>(c_rows(unit) * ldc_);
  }

  void run(int64_t m, int64_t rows, int64_t n, int64_t cols) {
    int64_t l = 0;
    do {
      const int64_t left = depth_ - l, k = std::min(left, block_);
      const int64_t at = l * D::kPerLane, count = std::min(size_.k - at, k * D::kPerLane);
      b_.pack(b_, n, cols, at, count, panels_);
      const int64_t step = a_.pack || cols > kTileCols ? kPackedRows : rows;
      for (int64_t i = 0; i < rows; i += step) {
        const int64_t some = std::min(step, rows - i);
        if (a_.pack) a_.pack(a_, m + i, some, at, count, rows_);
        for (int64_t j = 0; j < cols; j += kTileCols) {
          strips(m, i, some, n, j, std::min<int64_t>(kTileCols, cols - j), l, k, left == k);
        }
      }
      l += k;
    } while (l < depth_);
    finish_last();
  }

 private:
  // Rows [i, i + some) of the unit times the panel at column j, over k lanes from l on.
  void strips(int64_t m, int64_t i, int64_t some, int64_t n, int64_t j, int64_t cols, int64_t l,
              int64_t k, bool last) {
    // With nothing to be added up later, C of two strips takes turns.
    const bool once = last && l == 0;
    for (int64_t r = 0; r < some; r += D::kTileRows) {
      const int64_t count = std::min<int64_t>(D::kTileRows, some - r);
      float* c = c_ + (once ? (turn_ ^= D::kTileRows) : i + r) * ldc_ + j;
      const LanesA<Lane> a = !a_.pack    ? a_.in_place(m + i + r, l)
                             : a_.strips ? packed_strip<D>(rows_, r, k)
                                         : LanesA<Lane>{rows_ + r * k, k, 1};
      multiply_strip<D>(count, cols, k, a, panels_ + j * k, 0, c, ldc_, l > 0);
      if (last) {
        finish_last();
        done_ = {m + i + r, count, n + j, cols, c, ldc_};
      }
    }
  }
  // What finishes a tile waits for its last sums, and would keep the processor from looking ahead
  // to the next tile. So it runs behind that.
  void finish_last() {
    if (done_.rows > 0) finish_.call(finish_.context, done_);
    done_.rows = 0;
  }
  int64_t c_rows(const Unit& unit) const { return std::max<int64_t>(unit.rows, 2 * D::kTileRows); }
  size_t packed_lanes() const { return a_.pack ? packed_columns<D>(kPackedRows, block_) : 0; }

  const Size& size_;
  const Left<D>& a_;
  const Right<D>& b_;
  const Finish& finish_;
  const int64_t depth_, block_, ldc_;
  Scratch scratch_;
  Lane *rows_, *panels_;
  float* c_;
  MatrixUnit matrix_unit_;
  int64_t turn_ = 0;
  Tile done_{};
};

template <typename D>
void by_units(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
              const Finish& finish) {
  const Unit unit = choose_unit(size, a, parallel.threads);
  const int64_t row_blocks = ceil_div(size.m, unit.rows);
  const int64_t unit_cols = unit.panels * kTileCols, groups = ceil_div(size.n, unit_cols);
  for_units(parallel, row_blocks * groups, [&](Units& units) {
    Worker<D> worker(size, a, b, unit, finish);
    for (int64_t i; units.next(i);) {
      const int64_t m = i % row_blocks * unit.rows, n = i / row_blocks * unit_cols;
      worker.run(m, std::min(unit.rows, size.m - m), n, std::min(unit_cols, size.n - n));
    }
  });
}

// Products below this take less time than waking a thread.
constexpr int64_t kSerialProducts = int64_t{1} << 19;

template <typename D>
void few_rows(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
              const Finish& finish) {
  using Lane = typename D::Lane;
  const int64_t depth = lanes<D>(size.k);
  Scratch scratch(Scratch::bytes<Lane>(a.pack ? size.m * depth : 0));
  const Lane* x = static_cast<const Lane*>(a.data);
  int64_t x_ld = a.ld / D::kPerLane;
  if (a.pack) {
    Lane* packed = scratch.take<Lane>(size.m * depth);
    a.pack(a, 0, size.m, 0, size.k, packed);
    x = packed;
    x_ld = depth;
  }
  Parallel threads = parallel;
  if (size.m * size.n * size.k < kSerialProducts) threads.threads = 1;
  for_units(threads, panels(size.n), [&](Units& units) {
    float c[kFewRows * kTileCols];
    for (int64_t i; units.next(i);) {
      const int64_t n = i * kTileCols, cols = std::min<int64_t>(kTileCols, size.n - n);
      b.dots(b, x, x_ld, size.m, n, cols, size.k, c);
      for (int64_t r = 0; r < size.m; r += D::kTileRows) {
        const int64_t rows = std::min<int64_t>(D::kTileRows, size.m - r);
        finish.call(finish.context, {r, rows, n, cols, c + r * kTileCols, kTileCols});
      }
    }
  });
}

}  // namespace

template <typename D>
void matmul(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
            const Finish& finish) {
  if (size.m <= 0 || size.n <= 0) return;
  if (size.m <= kFewRows && b.dots && !a.strips && size.k > 0) {
    few_rows(parallel, size, a, b, finish);
  } else {
    by_units(parallel, size, a, b, finish);
  }
}

template void matmul(const Parallel&, const Size&, const Left<FloatDot>&, const Right<FloatDot>&,
                     const Finish&);
#if defined(__AVX512BF16__)
template void matmul(const Parallel&, const Size&, const Left<BFloat16Dot>&,
                     const Right<BFloat16Dot>&, const Finish&);
#endif

}  // namespace ft::FT_ISA
