// The cross-entropy of rows of logits, and its gradient.
// Forward reads the logits once and keeps two numbers a row (the online softmax, Milakov and
// Gimelshein 2018); backward reads them once and writes their gradient. About 20 FLOPs an element
// each: bytes are the cost, and of a fresh gradient the page faults.
#include <algorithm>

#include "loss.h"

namespace ft::FT_ISA {
namespace {

// A row is cut into pieces of at most so many logits, whatever the number of threads; short rows
// share a unit of work.
constexpr int64_t kPiece = int64_t{1} << 14;

struct Pieces {
  int64_t each, a_row, unit;  // logits of a piece, pieces of a row, pieces of a unit of work

  explicit Pieces(int64_t classes)
      : each(round_up(ceil_div(classes, std::max<int64_t>(1, ceil_div(classes, kPiece))), 64)),
        a_row(std::max<int64_t>(1, ceil_div(classes, std::max<int64_t>(1, each)))),
        unit(std::max<int64_t>(1, kPiece / std::max<int64_t>(1, each))) {}

  // Calls `f(row, piece, first logit, how many)` for every piece.
  template <typename F>
  void for_each(const Parallel& parallel, int64_t rows, int64_t classes, const F& f) const {
    const int64_t pieces = rows * a_row;
    for_units(parallel, ceil_div(pieces, unit), [&](Units& units) {
      for (int64_t u; units.next(u);) {
        for (int64_t i = u * unit; i < std::min(pieces, (u + 1) * unit); ++i) {
          const int64_t first = i % a_row * each;
          f(i / a_row, i, first, std::min(each, classes - first));
        }
      }
    });
  }
};

// A block of logits is read twice, for its maximum and then, from L1, for its exponentials. The
// first happens beside the second of the block before, so that memory never waits for arithmetic.
constexpr int64_t kBlock = 512;
constexpr int kAccumulators = 4;
static_assert(kBlock % (kAccumulators * kWidth) == 0);

// The processor's own prefetch ends with a page; and without this, a third to half of the time went
// by waiting (Xeon, 50 MB).
constexpr int64_t kAhead = int64_t{8} << 10;
template <typename T>
FT_INLINE void fetch_ahead(const T* x) {
  constexpr int64_t kBytes = kAccumulators * kWidth * sizeof(T);
#pragma GCC unroll 4
  for (int64_t b = 0; b < kBytes; b += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(x) + kAhead + b);
  }
}

struct Largest {
  Vec top[kAccumulators];

  Largest() {
    for (Vec& t : top) t = broadcast(-INFINITY);
  }
  float of_all() const { return largest_lane(max(max(top[0], top[1]), max(top[2], top[3]))); }
};

template <typename T>
float largest_of(const T* x, int64_t n) {
  Largest largest;
  Vec* const top = largest.top;
  int64_t j = 0;
  for (; j + kAccumulators * kWidth <= n; j += kAccumulators * kWidth) {
#pragma GCC unroll 4
    for (int i = 0; i < kAccumulators; ++i) top[i] = max(top[i], load(x + j + i * kWidth));
  }
  for (; j < n; j += kWidth) {
    const Vec v = load(x + j, n - j);
    top[0] = max(top[0], n - j >= kWidth ? v : select(lanes_below(n - j), v, top[0]));
  }
  return largest.of_all();
}

// What a block adds to a row's sums.
template <bool kSmooths>
class BlockSums {
 public:
  explicit BlockSums(float shift) : shift_(broadcast(shift)) {}
  FT_INLINE void add(Vec x, int i) {
    const Vec d = x - shift_;
    const auto e = SumOfExponentials::parts(d);
    total_[i] = fma(e.fraction, e.power, total_[i]);
    if constexpr (kSmooths) below_[i] += d;
  }
  FT_INLINE void add(Vec x, int64_t n, int i) {
    const IVec there = lanes_below(n);
    const Vec d = x - shift_;
    total_[i] += select(there, SumOfExponentials::of(d), zero());
    if constexpr (kSmooths) below_[i] += select(there, d, zero());
  }
  void onto(RowSums& row, int64_t n) const {
    row.total += double{sum((total_[0] + total_[1]) + (total_[2] + total_[3]))};
    if constexpr (kSmooths) {
      row.below += double{sum((below_[0] + below_[1]) + (below_[2] + below_[3]))};
    }
    row.count += n;
  }

 private:
  Vec shift_, total_[kAccumulators] = {}, below_[kAccumulators] = {};
};

template <typename T, bool kSmooths>
RowSums sums_of(const T* x, int64_t n) {
  RowSums row;
  float top = largest_of(x, std::min(kBlock, n));
  for (; n >= 2 * kBlock; n -= kBlock, x += kBlock) {
    row.raise(top);
    BlockSums<kSmooths> sums(row.shift());
    Largest next;
    for (int64_t j = 0; j < kBlock; j += kAccumulators * kWidth) {
      fetch_ahead(x + j + kBlock);
#pragma GCC unroll 4
      for (int i = 0; i < kAccumulators; ++i) {
        const T* const at = x + j + i * kWidth;
        sums.add(load(at), i);
        next.top[i] = max(next.top[i], load(at + kBlock));
      }
    }
    sums.onto(row, kBlock);
    top = next.of_all();
  }
  for (; n > 0; n -= kBlock, x += kBlock) {
    const int64_t size = std::min(kBlock, n);
    row.raise(top);
    BlockSums<kSmooths> sums(row.shift());
    int64_t j = 0;
    for (; j + kAccumulators * kWidth <= size; j += kAccumulators * kWidth) {
#pragma GCC unroll 4
      for (int i = 0; i < kAccumulators; ++i) sums.add(load(x + j + i * kWidth), i);
    }
    for (; j < size; j += kWidth) sums.add(load(x + j, size - j), size - j, 0);
    sums.onto(row, size);
    if (n > kBlock) top = largest_of(x + kBlock, n - kBlock);
  }
  return row;
}

template <typename T, bool kSmooths>
void forward(const CrossEntropyParams& p, const Parallel& parallel) {
  const Pieces pieces(p.classes);
  Scratch scratch(Scratch::bytes<RowSums>(p.rows * pieces.a_row));
  RowSums* const sums = scratch.take<RowSums>(p.rows * pieces.a_row);
  const Losses losses(p.options, p.target, p.rows, p.loss);
  pieces.for_each(parallel, p.rows, p.classes,
                  [&](int64_t r, int64_t piece, int64_t first, int64_t n) {
                    if (p.target[r] == p.options.ignore_index) return;
                    sums[piece] = sums_of<T, kSmooths>(row<T>(p.logits, r) + first, n);
                  });
  constexpr int64_t kUnitRows = 64;
  for_units(parallel, ceil_div(p.rows, kUnitRows), [&](Units& units) {
    for (int64_t u; units.next(u);) {
      for (int64_t r = u * kUnitRows; r < std::min(p.rows, (u + 1) * kUnitRows); ++r) {
        p.statistics[r] = {0.0f, 0.0f};
        if (p.target[r] == p.options.ignore_index) {
          losses.ignore(r);
          continue;
        }
        RowSums all = sums[r * pieces.a_row];
        for (int64_t i = 1; i < pieces.a_row; ++i) all.add(sums[r * pieces.a_row + i]);
        losses.set(r, all, element(row<T>(p.logits, r) + p.target[r]));
        p.statistics[r] = all.statistics();
      }
    }
  });
  losses.reduce();
}

template <typename T>
void backward(const CrossEntropyGradParams& p, const Parallel& parallel) {
  const LossGradients gradients(p.options, p.target, p.rows, p.grad_loss);
  Pieces(p.classes).for_each(
      parallel, p.rows, p.classes, [&](int64_t r, int64_t, int64_t first, int64_t n) {
        T* const to = mutable_row<T>(p.dlogits, r) + first;
        const int64_t target = p.target[r];
        if (target == p.options.ignore_index) return void(std::fill_n(to, n, T{}));
        const T* const x = row<T>(p.logits, r) + first;
        const RowGradient gradient(p.options, p.statistics[r], gradients.of(r), p.classes);
        int64_t j = 0;
        for (; j + kAccumulators * kWidth <= n; j += kAccumulators * kWidth) {
          fetch_ahead(x + j);
#pragma GCC unroll 2
          for (int64_t i = j; i < j + kAccumulators * kWidth; i += 2 * kWidth) {
            const Vec low = gradient.of<T>(load(x + i)),
                      high = gradient.of<T>(load(x + i + kWidth));
            store_pair(to + i, low, high);
          }
        }
        for (; j < n; j += kWidth) store(to + j, gradient.of<T>(load(x + j, n - j)), n - j);
        if (const int64_t at = target - first; at >= 0 && at < n) {
          store(to + at, broadcast(gradient.at_target(element(x + at))), 1);
        }
      });
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    p.options.label_smoothing > 0.0f ? forward<T, true>(p, parallel)
                                     : forward<T, false>(p, parallel);
  });
}

void cross_entropy_bwd(const CrossEntropyGradParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p, parallel); });
}

}  // namespace ft::FT_ISA
