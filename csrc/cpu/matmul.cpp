// The driver of matmul.h: units of work, packing, the sum over blocks of k.
#include "matmul.h"

#include <algorithm>

#include "few_rows.h"
#include "scratch.h"

namespace ft::FT_ISA {
template <typename D>
void pack_panels(const Parallel& parallel, const Right<D>& b, int64_t first, int64_t n, int64_t k,
                 typename D::Lane* to, int64_t stride) {
  for_units(parallel, panels(n), [&](Units& units) {
    for (int64_t i; units.next(i);) {
      const int64_t at = i * kTileCols;
      b.pack(b, first + at, std::min<int64_t>(kTileCols, n - at), 0, k, to + i * stride);
    }
  });
}

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
  // The matrix unit is soon done with a block of k: C, which it adds to, has to stay in L2 as well.
  static constexpr int64_t kUnitRows = 192;
  static constexpr int64_t kPanelBytes = int64_t{384} << 10;
  // Where A's columns have to be packed for every group of panels, larger groups do it less often;
  // they want the 2 MB of L2 that processors with a matrix unit have.
#if defined(__AMX_BF16__)
  static constexpr int64_t kStripsPanelBytes = int64_t{592} << 10;
#else
  static constexpr int64_t kStripsPanelBytes = kPanelBytes;
#endif
  static constexpr int64_t kUnitsPerThread = 4;

  int64_t depth = 0, block = 0;  // lanes of k: of all products, and of a block at most
  int64_t rows, panels;          // of a unit, at most
  int64_t strips, row_units;

  Plan(const Size& size, std::span<const Product<D>> sum, int64_t threads) {
    for (const Product<D>& product : sum) {
      depth += lanes<D>(product.k);
      block = std::max(block, block_lanes<D>(lanes<D>(product.k)));
    }
    const int64_t panel_bytes = block * kTileCols * static_cast<int64_t>(sizeof(typename D::Lane));
    const int64_t columns = FT_ISA::panels(size.n);
    const int64_t bytes = sum[0].a.strips ? kStripsPanelBytes : kPanelBytes;
    panels = std::clamp<int64_t>(bytes / std::max<int64_t>(1, panel_bytes), 1, columns);
    rows = D::kInMatrixUnit && !sum[0].a.strips ? kUnitRows : kRows;
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
  Worker(const Size& size, std::span<const Product<D>> sum, const Plan<D>& plan, const Lane* packed,
         int64_t first_packed, const Finish& finish)
      : size_(size),
        sum_(sum),
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
    int64_t before = 0;  // lanes of the products that are done
    for (const Product<D>& product : sum_) {
      const bool last = before + lanes<D>(product.k) == plan_.depth;
      add(product, before, last, {m, 0, rows}, panel, count);
      before += lanes<D>(product.k);
      if (last) break;  // what may follow has no elements
    }
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

  // C (+)= one product, a block of k at a time.
  void add(const Product<D>& product, int64_t before, bool last, const Rows& unit, int64_t panel,
           int64_t count) {
    const auto& [a, b, k_elements] = product;
    const int64_t depth = lanes<D>(k_elements), block = block_lanes<D>(depth);
    const int64_t n = panel * kTileCols, cols = std::min(size_.n - n, count * kTileCols);
    int64_t l = 0;
    do {
      const int64_t left = depth - l, k = std::min(left, block);
      const int64_t at = l * D::kPerLane, elements = std::min(k_elements - at, k * D::kPerLane);
      if (!packed_) b.pack(b, n, cols, at, elements, panels_);
      const Panels panels =
          packed_
              ? Panels{packed_ + ((panel - first_packed_) * plan_.depth + before + l) * kTileCols,
                       plan_.depth * kTileCols}
              : Panels{panels_, k * kTileCols};
      const int64_t step = a.pack ? kPackedRows : unit.count;
      for (int64_t i = 0; i < unit.count; i += step) {
        const int64_t some = std::min(step, unit.count - i);
        if (a.pack) a.pack(a, unit.first + i, some, at, elements, rows_);
        for (int64_t r = 0; r < some; r += D::kTileRows) {
          const LanesA<Lane> strip_a = !a.pack    ? a.in_place(unit.first + i + r, l)
                                       : a.strips ? packed_strip<D>(rows_, r, k)
                                                  : LanesA<Lane>{rows_ + r * k, k, 1};
          strip({unit.first, i + r, std::min<int64_t>(D::kTileRows, some - r)}, n, cols, strip_a,
                panels, k, before + l > 0, last && left == k);
        }
      }
      l += k;
    } while (l < depth);
  }

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
    const auto packs = [](const Product<D>& product) { return product.a.pack != nullptr; };
    if (std::any_of(sum_.begin(), sum_.end(), packs))
      rows_ = from.template take<Lane>(packed_columns<D>(kPackedRows, plan_.block));
    if (!packed_) panels_ = from.template take<Lane>(plan_.panels * plan_.block * kTileCols);
    c_ = from.template take<float>((once_ ? 2 * D::kTileRows : plan_.rows) * ldc_);
  }

  const Size& size_;
  const std::span<const Product<D>> sum_;
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

// Columns [first, first + n) of C; `packed` is B's first panel of them.
template <typename D>
void by_units(const Parallel& parallel, const Plan<D>& plan, const Size& size,
              std::span<const Product<D>> sum, int64_t first, int64_t n,
              const typename D::Lane* packed, const Finish& finish) {
  const int64_t columns = panels(n), groups = ceil_div(columns, plan.panels);
  for_units(parallel, plan.row_units * groups, [&](Units& units) {
    Worker<D> worker(size, sum, plan, packed, first / kTileCols, finish);
    for (int64_t i; units.next(i);) {
      // All rows meet a group of panels before the next one: it stays in the thread's L2.
      const int64_t unit = i % plan.row_units, m = plan.row(unit);
      const int64_t panel = i / plan.row_units * plan.panels;
      worker.run(m, std::min(plan.row(unit + 1), size.m) - m, first / kTileCols + panel,
                 std::min(plan.panels, columns - panel));
    }
  });
}

// Of panels that are packed ahead, for each thread.
constexpr int64_t kAheadBytes = int64_t{512} << 10;

template <typename D>
void many_rows(const Parallel& parallel, const Size& size, std::span<const Product<D>> sum,
               const Finish& finish) {
  using Lane = typename D::Lane;
  const Plan<D> plan(size, sum, parallel.threads);
  if (sum.size() == 1 && sum[0].b.panels) {
    return by_units(parallel, plan, size, sum, 0, size.n, sum[0].b.panels, finish);
  }
  const int64_t group = plan.panels * plan.depth * kTileCols * static_cast<int64_t>(sizeof(Lane));
  // Where each panel belongs to one unit, or a sum is very long, units pack a block of k at a time.
  if (plan.row_units == 1 || group > kPackedBytes) {
    return by_units<D>(parallel, plan, size, sum, 0, size.n, nullptr, finish);
  }
  // Panels that several units need are packed once, ahead; as many at a time as stay in L2.
  const int64_t part = kAheadBytes * parallel.threads / std::max<int64_t>(1, group);
  const int64_t groups =
      std::min(std::max<int64_t>(1, part), ceil_div(panels(size.n), plan.panels));
  const int64_t each = groups * plan.panels * kTileCols;
  Scratch scratch(Scratch::bytes<Lane>(each * plan.depth));
  Lane* packed = scratch.take<Lane>(each * plan.depth);
  for (int64_t n = 0; n < size.n; n += each) {
    const int64_t cols = std::min(each, size.n - n);
    Lane* to = packed;
    for (const Product<D>& product : sum) {
      pack_panels(parallel, product.b, n, cols, product.k, to, plan.depth * kTileCols);
      to += panel_size<D>(product.k);
    }
    by_units(parallel, plan, size, sum, n, cols, packed, finish);
  }
}

}  // namespace

template <typename D>
void matmul(const Parallel& parallel, const Size& size, std::span<const Product<D>> sum,
            const Finish& finish) {
  if (size.m <= 0 || size.n <= 0) return;
  const int64_t rows = std::max(size.m, size.of);
  const auto few = [&](const Product<D>& product) {
    const auto& [a, b, k] = product;
    return rows <= most_few_rows(b) && !a.strips && k > 0;
  };
  if (!std::all_of(sum.begin(), sum.end(), few)) return many_rows(parallel, size, sum, finish);
  multiply_few_rows(parallel, {size.m, size.n, 0, rows}, sum, finish);
}

template <typename D>
Packed<D>::Packed(const Parallel& parallel, const Right<D>& b, int64_t n, int64_t k, int64_t m,
                  int64_t products)
    : b_(b),
      lanes_(products > 1 && m > most_few_rows(b) ? panels(n) * panel_size<D>(k) : 0),
      scratch_(Scratch::bytes<Lane>(lanes_ <= kMost ? lanes_ : 0)) {
  if (lanes_ == 0 || lanes_ > kMost) return;
  Lane* to = scratch_.template take<Lane>(lanes_);
  pack_panels(parallel, b, 0, n, k, to, panel_size<D>(k));
  b_.panels = to;
}

template void matmul(const Parallel&, const Size&, std::span<const Product<FloatDot>>,
                     const Finish&);
template class Packed<FloatDot>;
template void pack_panels(const Parallel&, const Right<FloatDot>&, int64_t, int64_t, int64_t,
                          float*, int64_t);
#if defined(__AVX512BF16__)
template void matmul(const Parallel&, const Size&, std::span<const Product<BFloat16Dot>>,
                     const Finish&);
template class Packed<BFloat16Dot>;
template void pack_panels(const Parallel&, const Right<BFloat16Dot>&, int64_t, int64_t, int64_t,
                          uint32_t*, int64_t);
#endif

}  // namespace ft::FT_ISA
