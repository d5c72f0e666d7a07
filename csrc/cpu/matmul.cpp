// The driver of matmul.h: units of work, packing, the sum over blocks of k.
#include "matmul.h"

#include <algorithm>

#include "scratch.h"

namespace ft::FT_ISA {
namespace {

// Lanes of a block of k: about equal ones, whole vectors.
template <typename D>
constexpr int64_t block_lanes(int64_t depth) {
  constexpr int64_t kWhole = D::kInMatrixUnit ? kSumLanes / 2 : kSumLanes;
  if (depth <= kWhole) return depth;
  return round_up(ceil_div(depth, ceil_div(depth, kWhole)), 16);
}

// How C is cut. A unit of work is so many rows times so many panels of columns. Strip after strip
// of its rows meets all its panels, so a block of A is read once and stays in L1 meanwhile, a block
// of the panels stays in L2, and C of several blocks of k beside it.
template <typename D>
struct Plan {
  static constexpr int64_t kRows = 192;  // whole tiles of either height
  static constexpr int64_t kPanelBytes = int64_t{384} << 10;
  static constexpr int64_t kUnitsPerThread = 4;

  int64_t depth, block;  // lanes of k: all, and of a block
  int64_t rows, panels;  // of a unit
  int64_t row_units;

  Plan(const Size& size, int64_t threads) : depth(lanes<D>(size.k)), block(block_lanes<D>(depth)) {
    const int64_t panel_bytes = block * kTileCols * static_cast<int64_t>(sizeof(typename D::Lane));
    const int64_t columns = FT_ISA::panels(size.n);
    panels = std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(1, panel_bytes), 1, columns);
    rows = kRows;
    const int64_t wanted = threads > 1 ? kUnitsPerThread * threads : 1;
    // Fewer columns a unit first: they cost a look at A, where fewer rows cost a look at B.
    const auto units = [&] { return ceil_div(size.m, rows) * ceil_div(columns, panels); };
    while (panels > 1 && units() < wanted) panels = ceil_div(panels, 2);
    while (rows > 2 * D::kTileRows && units() < wanted) rows = round_up(rows / 2, D::kTileRows);
    panels = ceil_div(columns, ceil_div(columns, panels));
    row_units = ceil_div(size.m, rows);
    rows = round_up(ceil_div(size.m, row_units), D::kTileRows);
  }
};

// Of A that is packed at a time. Whole tiles of either height.
constexpr int64_t kPackedRows = 96;

template <typename D>
class Worker {
  using Lane = typename D::Lane;

 public:
  // `packed`: all columns of B as panels, one after the other, or null where each belongs to one
  // unit, which then packs it.
  Worker(const Size& size, const Left<D>& a, const Right<D>& b, const Plan<D>& plan,
         const Lane* packed, const Finish& finish)
      : size_(size),
        a_(a),
        b_(b),
        plan_(plan),
        finish_(finish),
        packed_(packed),
        once_(plan.block == plan.depth),
        ldc_(once_ ? kTileCols : plan.panels * kTileCols),
        scratch_(ScratchSize::of([&](auto& size) { take_all(size); })) {
    take_all(scratch_);
  }

  // Rows [m, m + rows) times `count` panels from `panel` on.
  void run(int64_t m, int64_t rows, int64_t panel, int64_t count) {
    int64_t l = 0;
    do {
      const int64_t left = plan_.depth - l, k = std::min(left, plan_.block);
      const int64_t at = l * D::kPerLane, elements = std::min(size_.k - at, k * D::kPerLane);
      const int64_t n = panel * kTileCols, cols = std::min(size_.n - n, count * kTileCols);
      if (!packed_) b_.pack(b_, n, cols, at, elements, panels_);
      const Panels b =
          packed_ ? Panels{packed_ + (panel * plan_.depth + l) * kTileCols, plan_.depth * kTileCols}
                  : Panels{panels_, k * kTileCols};
      const int64_t step = a_.pack ? kPackedRows : rows;
      for (int64_t i = 0; i < rows; i += step) {
        const int64_t some = std::min(step, rows - i);
        if (a_.pack) a_.pack(a_, m + i, some, at, elements, rows_);
        for (int64_t r = 0; r < some; r += D::kTileRows) {
          const LanesA<Lane> a = !a_.pack    ? a_.in_place(m + i + r, l)
                                 : a_.strips ? packed_strip<D>(rows_, r, k)
                                             : LanesA<Lane>{rows_ + r * k, k, 1};
          strip({m, i + r, std::min<int64_t>(D::kTileRows, some - r)}, n, cols, a, b, k, l > 0,
                left == k);
        }
      }
      l += k;
    } while (l < plan_.depth);
    finish_last();
  }

 private:
  struct Panels {
    const Lane* first;
    int64_t stride;
  };
  struct Rows {
    int64_t first, at, count;  // of the unit, in the unit, and how many
  };

  void strip(const Rows& rows, int64_t n, int64_t cols, const LanesA<Lane>& a, Panels b, int64_t k,
             bool accumulate, bool last) {
    const Meanwhile meanwhile{this, [](void* self) { static_cast<Worker*>(self)->finish_rows(); }};
    for (int64_t j = 0; j < cols; j += kTileCols, b.first += b.stride) {
      const int64_t some = std::min<int64_t>(kTileCols, cols - j);
      // With nothing to be added up later, C of two tiles takes turns.
      float* c = c_ + (once_ ? (turn_ ^= D::kTileRows) * kTileCols : rows.at * ldc_ + j);
      if constexpr (D::kInMatrixUnit) {
        rows_a_step_ = ceil_div(
            done_.rows, std::max<int64_t>(1, k / kMatrixStep) * ceil_div(some, kMatrixCols));
        multiply_strip<D>(rows.count, some, k, a, b.first, 0, c, ldc_, accumulate, meanwhile);
      } else {
        multiply_strip<D>(rows.count, some, k, a, b.first, 0, c, ldc_, accumulate);
      }
      if (!last) continue;
      finish_last();
      done_ = {rows.first + rows.at, rows.count, n + j, some, c, ldc_};
    }
  }
  // What finishes a tile waits for its last sums, and would keep the processor from looking ahead
  // to the next tile. So it runs behind that; beside it where that leaves the core idle.
  void finish_rows() {
    if (done_.rows == 0) return;
    const int64_t count = std::min(rows_a_step_, done_.rows);
    finish_.call(finish_.context, {done_.row, count, done_.col, done_.cols, done_.c, done_.ldc});
    done_.row += count;
    done_.rows -= count;
    done_.c += count * done_.ldc;
  }
  void finish_last() {
    if (done_.rows > 0) finish_.call(finish_.context, done_);
    done_.rows = 0;
  }
  template <typename From>
  void take_all(From& from) {
    if (a_.pack) rows_ = from.template take<Lane>(packed_columns<D>(kPackedRows, plan_.block));
    if (!packed_) panels_ = from.template take<Lane>(plan_.panels * plan_.block * kTileCols);
    c_ = from.template take<float>((once_ ? 2 * D::kTileRows : plan_.rows) * ldc_);
  }

  const Size& size_;
  const Left<D>& a_;
  const Right<D>& b_;
  const Plan<D>& plan_;
  const Finish& finish_;
  const Lane* const packed_;
  const bool once_;
  const int64_t ldc_;
  Scratch scratch_;
  Lane *rows_ = nullptr, *panels_ = nullptr;
  float* c_;
  MatrixUnit matrix_unit_;
  int64_t turn_ = 0, rows_a_step_ = 0;
  Tile done_{};
};

// All panels of B, in the caller's scratch.
template <typename D>
void pack_panels(const Parallel& parallel, const Size& size, const Right<D>& b, int64_t depth,
                 typename D::Lane* to) {
  for_units(parallel, panels(size.n), [&](Units& units) {
    for (int64_t i; units.next(i);) {
      const int64_t n = i * kTileCols;
      b.pack(b, n, std::min<int64_t>(kTileCols, size.n - n), 0, size.k, to + n * depth);
    }
  });
}

template <typename D>
void by_units(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
              const Finish& finish) {
  using Lane = typename D::Lane;
  const Plan<D> plan(size, parallel.threads);
  // Panels that several units need are packed once, ahead.
  const bool ahead = plan.row_units > 1;
  const int64_t columns = panels(size.n), groups = ceil_div(columns, plan.panels);
  Scratch scratch(Scratch::bytes<Lane>(ahead ? columns * plan.depth * kTileCols : 0));
  Lane* packed = ahead ? scratch.take<Lane>(columns * plan.depth * kTileCols) : nullptr;
  if (ahead) pack_panels(parallel, size, b, plan.depth, packed);
  for_units(parallel, plan.row_units * groups, [&](Units& units) {
    Worker<D> worker(size, a, b, plan, packed, finish);
    for (int64_t i; units.next(i);) {
      const int64_t m = i / groups * plan.rows, panel = i % groups * plan.panels;
      worker.run(m, std::min(plan.rows, size.m - m), panel, std::min(plan.panels, columns - panel));
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
