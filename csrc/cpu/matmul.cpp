// The driver of matmul.h: units of work, packing, the sum over blocks of k.
#include "matmul.h"

#include <algorithm>

#include "few_rows_amx.h"
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
  static constexpr int64_t kRows = 576;  // whole tiles of either height
  static constexpr int64_t kPanelBytes = int64_t{384} << 10;
  static constexpr int64_t kUnitsPerThread = 4;

  int64_t depth, block;  // lanes of k: all, and of a block
  int64_t rows, panels;  // of a unit, at most
  int64_t strips, row_units;

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
    const int64_t groups = ceil_div(columns, panels);
    panels = ceil_div(columns, groups);
    // About equal units, and as many for each thread.
    strips = ceil_div(size.m, D::kTileRows);
    row_units = ceil_div(size.m, rows);
    if (row_units * groups % threads != 0 && row_units > 1) {
      row_units = std::min(round_up(row_units, threads), strips);
    }
    rows = ceil_div(strips, row_units) * D::kTileRows;
  }
  // The first row of a unit.
  int64_t row(int64_t unit) const { return unit * strips / row_units * D::kTileRows; }
};

// Of A that is packed at a time. Whole tiles of either height.
constexpr int64_t kPackedRows = 96;

template <typename D>
class Worker {
  using Lane = typename D::Lane;

 public:
  // `packed`: B's panels from `first_packed` on, one after the other, or null where each belongs to
  // one unit, which then packs it.
  Worker(const Size& size, const Left<D>& a, const Right<D>& b, const Plan<D>& plan,
         const Lane* packed, int64_t first_packed, const Finish& finish)
      : size_(size),
        a_(a),
        b_(b),
        plan_(plan),
        finish_(finish),
        packed_(packed),
        first_packed_(first_packed),
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
          packed_ ? Panels{packed_ + ((panel - first_packed_) * plan_.depth + l) * kTileCols,
                           plan_.depth * kTileCols}
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
      // With nothing to be added up later two tiles of C take turns, since one is being finished.
      float* c = c_ + (once_ ? (turn_ ^= D::kTileRows) * kTileCols : rows.at * ldc_ + j);
      const int64_t steps = std::max<int64_t>(1, k / kMatrixStep) * ceil_div(some, kMatrixCols);
      rows_a_step_ = ceil_div(done_.rows, steps);
      multiply_strip<D>(rows.count, some, k, a, b.first, 0, c, ldc_, accumulate, meanwhile);
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
  const int64_t first_packed_;
  const bool once_;
  const int64_t ldc_;
  Scratch scratch_;
  Lane *rows_ = nullptr, *panels_ = nullptr;
  float* c_;
  MatrixUnit matrix_unit_;
  int64_t turn_ = 0, rows_a_step_ = 0;
  Tile done_{};
};

// Columns [first, first + n) of B, a multiple of kTileCols from 0 on.
template <typename D>
void pack_panels(const Parallel& parallel, const Right<D>& b, int64_t first, int64_t n, int64_t k,
                 typename D::Lane* to) {
  for_units(parallel, panels(n), [&](Units& units) {
    for (int64_t i; units.next(i);) {
      const int64_t at = i * kTileCols;
      b.pack(b, first + at, std::min<int64_t>(kTileCols, n - at), 0, k, to + i * panel_size<D>(k));
    }
  });
}

// Columns [first, first + n) of C; `packed` is B's first panel of them.
template <typename D>
void by_units(const Parallel& parallel, const Plan<D>& plan, const Size& size, const Left<D>& a,
              const Right<D>& b, int64_t first, int64_t n, const typename D::Lane* packed,
              const Finish& finish) {
  const int64_t columns = panels(n), groups = ceil_div(columns, plan.panels);
  for_units(parallel, plan.row_units * groups, [&](Units& units) {
    Worker<D> worker(size, a, b, plan, packed, first / kTileCols, finish);
    for (int64_t i; units.next(i);) {
      const int64_t unit = i / groups, m = plan.row(unit), panel = i % groups * plan.panels;
      worker.run(m, std::min(plan.row(unit + 1), size.m) - m, first / kTileCols + panel,
                 std::min(plan.panels, columns - panel));
    }
  });
}

template <typename D>
void many_rows(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
               const Finish& finish) {
  using Lane = typename D::Lane;
  const Plan<D> plan(size, parallel.threads);
  if (b.panels) return by_units(parallel, plan, size, a, b, 0, size.n, b.panels, finish);
  const int64_t group = plan.panels * plan.depth * kTileCols * static_cast<int64_t>(sizeof(Lane));
  // Where each panel belongs to one unit, or a sum is very long, units pack a block of k at a time.
  if (plan.row_units == 1 || group > kPackedBytes) {
    return by_units(parallel, plan, size, a, b, 0, size.n, nullptr, finish);
  }
  // Panels that several units need are packed once, ahead; a part of a large B at a time.
  const int64_t groups =
      std::min(kPackedBytes / std::max<int64_t>(1, group), ceil_div(panels(size.n), plan.panels));
  const int64_t each = groups * plan.panels * kTileCols;
  Scratch scratch(Scratch::bytes<Lane>(each * plan.depth));
  Lane* packed = scratch.take<Lane>(each * plan.depth);
  for (int64_t n = 0; n < size.n; n += each) {
    const int64_t cols = std::min(each, size.n - n);
    pack_panels(parallel, b, n, cols, size.k, packed);
    by_units(parallel, plan, size, a, b, n, cols, packed, finish);
  }
}

// Products below this take less time than waking a thread.
constexpr int64_t kSerialProducts = int64_t{1} << 19;
// Of C's rows that a streamed B is added to: a share of L1. And elements of k that are added up,
// sixteen a step, before the sums of others: so no sum has many terms, and rounding errors stay
// small.
constexpr int64_t kStreamedBytes = int64_t{24} << 10;
constexpr int64_t kLeastRun = 256;  // of columns
constexpr int64_t kStreamedSum = 256;

// Columns of a unit of few rows. A streamed B is read in runs that are as long as can be.
template <typename D>
int64_t few_columns(const Size& size, const Right<D>& b, int64_t threads) {
  if (!b.streamed) return kTileCols;
  const int64_t most = kStreamedBytes / (size.m * static_cast<int64_t>(sizeof(float)));
  const int64_t units = std::max(ceil_div(size.n, most), threads > 1 ? 2 * threads : 1);
  return round_up(std::max(ceil_div(size.n, units), std::min(size.n, kLeastRun)), kTileCols);
}

#if defined(__AMX_BF16__)
// B is contiguous along k.
void few_rows_in_unit(const Parallel& parallel, const Size& size, const uint32_t* x, int64_t x_ld,
                      const Right<BFloat16Dot>& b, const Finish& finish) {
  constexpr int64_t kTileRows = BFloat16Dot::kTileRows;
  const int64_t k = size.k, lanes_of_x = unit_rows(size.m, k);
  Scratch scratch(Scratch::bytes<uint32_t>(lanes_of_x));
  uint32_t* packed = scratch.take<uint32_t>(lanes_of_x);
  pack_rows_amx(x, x_ld, size.m, lanes<BFloat16Dot>(k), packed);
  for_units(parallel, panels(size.n), [&](Units& units) {
    const FewRowsUnit unit(true);
    const int64_t count = size.m * kTileCols;
    Scratch own(Scratch::bytes<float>(count) + Scratch::bytes<bf16>(unit_copies(k)));
    float* c = own.take<float>(count);
    bf16* copies = own.take<bf16>(unit_copies(k));
    for (int64_t i; units.next(i);) {
      const int64_t n = i * kTileCols, cols = std::min<int64_t>(kTileCols, size.n - n);
      const bf16* columns[kTileCols];
      for (int64_t j = 0; j < kTileCols; ++j) {
        columns[j] = static_cast<const bf16*>(b.data) + (n + std::min(j, cols - 1)) * b.ld;
      }
      dot_rows_amx(packed, size.m, k, columns, cols, copies, c, kTileCols);
      for (int64_t r = 0; r < size.m; r += kTileRows) {
        const int64_t rows = std::min(kTileRows, size.m - r);
        finish.call(finish.context, {r, rows, n, cols, c + r * kTileCols, kTileCols});
      }
    }
  });
}
#endif

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
  if constexpr (D::kInMatrixUnit) {
    if (b.in_lanes && size.m >= kUnitFewest) {
      return few_rows_in_unit(threads, size, x, x_ld, b, finish);
    }
  }
  const int64_t each = few_columns(size, b, threads.threads);
  const int64_t sum = b.streamed ? kStreamedSum : size.k;
  for_units(threads, ceil_div(size.n, each), [&](Units& units) {
    const int64_t count = size.m * each;
    Scratch own(Scratch::bytes<float>(count) * (size.k > sum ? 2 : 1));
    float* c = own.take<float>(count);
    float* more = size.k > sum ? own.take<float>(count) : nullptr;
    for (int64_t i; units.next(i);) {
      const int64_t n = i * each, cols = std::min(each, size.n - n);
      b.few(b, x, x_ld, size.m, n, cols, 0, std::min(sum, size.k), c, each);
      for (int64_t at = sum; at < size.k; at += sum) {
        b.few(b, x, x_ld, size.m, n, cols, at, std::min(sum, size.k - at), more, each);
        for (int64_t j = 0; j < count; j += kWidth) store(c + j, load(c + j) + load(more + j));
      }
      for (int64_t j = 0; j < cols; j += kTileCols) {
        for (int64_t r = 0; r < size.m; r += D::kTileRows) {
          const int64_t rows = std::min<int64_t>(D::kTileRows, size.m - r);
          const int64_t some = std::min<int64_t>(kTileCols, cols - j);
          finish.call(finish.context, {r, rows, n + j, some, c + r * each + j, each});
        }
      }
    }
  });
}

}  // namespace

template <typename D>
void matmul(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
            const Finish& finish) {
  if (size.m <= 0 || size.n <= 0) return;
  if (size.m <= most_few_rows(b) && !a.strips && size.k > 0) {
    few_rows(parallel, size, a, b, finish);
  } else {
    many_rows(parallel, size, a, b, finish);
  }
}

template <typename D>
Packed<D>::Packed(const Parallel& parallel, const Right<D>& b, int64_t n, int64_t k, int64_t m,
                  int64_t products)
    : b_(b),
      lanes_(products > 1 && m > most_few_rows(b) ? panels(n) * panel_size<D>(k) : 0),
      scratch_(Scratch::bytes<Lane>(lanes_ <= kMost ? lanes_ : 0)) {
  if (lanes_ == 0 || lanes_ > kMost) return;
  Lane* to = scratch_.template take<Lane>(lanes_);
  pack_panels(parallel, b, 0, n, k, to);
  b_.panels = to;
}

template void matmul(const Parallel&, const Size&, const Left<FloatDot>&, const Right<FloatDot>&,
                     const Finish&);
template class Packed<FloatDot>;
#if defined(__AVX512BF16__)
template class Packed<BFloat16Dot>;
template void matmul(const Parallel&, const Size&, const Left<BFloat16Dot>&,
                     const Right<BFloat16Dot>&, const Finish&);
#endif

}  // namespace ft::FT_ISA
