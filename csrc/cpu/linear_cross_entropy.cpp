// The cross-entropy of hidden · weightᵀ + bias, and its gradients, a block of the vocabulary at a
// time: the (tokens x vocabulary) logits never exist (cut cross-entropy, Wijmans et al. 2024).
// 2 M V C FLOPs forward; 6 M V C backward, which makes the logits once more. The weight is read
// once each time, and its gradient written once.
#include <algorithm>
#include <cstring>

#include "gradients.h"
#include "loss.h"

namespace ft::FT_ISA {
namespace {

// The vocabulary is cut into blocks of whole panels: as many classes as are multiplied by the
// weight with one sum. What is packed of the weight and the logits of a block stay near L2.
constexpr int64_t kBlock = kSumLanes;
// Few rows read the weight in place, and have nothing else to share between threads.
constexpr int64_t kBlockOfFewRows = 16 * kBlock;

template <typename F>
void for_blocks(int64_t classes, int64_t block, const F& f) {
  for (int64_t v = 0; v < classes; v += block) f(v, std::min(block, classes - v));
}

// The rows that count, one after another: the kernels below number them anew.
template <typename T>
class Counted {
 public:
  template <typename Params>
  explicit Counted(const Params& p)
      : count_(counted_rows(p.target, p.rows, p.options.ignore_index)),
        all_(count_ == p.rows),
        scratch_(Scratch::bytes<int64_t>(count_) +
                 Scratch::bytes<T>(all_ ? 0 : count_ * p.channels)),
        rows_(scratch_.take<int64_t>(count_)),
        hidden_(p.hidden) {
    for (int64_t r = 0, i = 0; r < p.rows; ++r) {
      if (p.target[r] != p.options.ignore_index) rows_[i++] = r;
    }
    if (all_) return;
    T* const to = scratch_.take<T>(count_ * p.channels);
    for (int64_t i = 0; i < count_; ++i) {
      std::memcpy(to + i * p.channels, row<T>(p.hidden, rows_[i]), p.channels * sizeof(T));
    }
    hidden_ = {to, {p.channels}};
  }
  int64_t count() const { return count_; }
  bool all() const { return all_; }
  int64_t operator[](int64_t i) const { return rows_[i]; }
  const RowsView& hidden() const { return hidden_; }

 private:
  const int64_t count_;
  const bool all_;
  Scratch scratch_;
  int64_t* const rows_;
  RowsView hidden_;
};

// ---- Forward

// Of the logits that a panel has of each row: the largest, m, the sums of e^(x - m) and x - m.
struct PanelSums {
  float *maximum, *total, *below;  // [row][panel of the block]
  int64_t ld;
};

template <typename T, bool kSmooths>
struct Gathered {
  const T* bias;  // of the block
  const int64_t* target;
  int64_t first;  // class of the block
  PanelSums sums;
  float* picked;  // (rows,), the target's logit

  void operator()(const Tile& t) const {
    const T* const b = bias ? bias + t.col : nullptr;
    const float* c = t.c;
    for (int64_t r = t.row; r < t.row + t.rows; ++r, c += t.ldc) {
      Vec x[kTileVecs], top = broadcast(-INFINITY);
#pragma GCC unroll 4
      for (int i = 0; i < kTileVecs; ++i) {
        const int64_t left = t.cols - i * kWidth;
        x[i] = broadcast(-INFINITY);
        if (left <= 0) continue;
        Vec v = load(c + i * kWidth);
        if (b) v += load(b + i * kWidth, left);
        x[i] = left >= kWidth ? v : select(lanes_below(left), v, x[i]);
        top = max(top, x[i]);
      }
      const float m = largest_lane(top), shift = m == -INFINITY ? 0.0f : m;
      Vec total = zero(), below = zero();
#pragma GCC unroll 4
      for (int i = 0; i < kTileVecs; ++i) {
        const int64_t left = t.cols - i * kWidth;
        if (left <= 0) continue;
        const Vec d = x[i] - broadcast(shift);
        const auto e = SumOfExponentials::parts(d);
        total = fma(e.fraction, e.power, total);
        if constexpr (kSmooths) below += left >= kWidth ? d : select(lanes_below(left), d, zero());
      }
      const int64_t at = r * sums.ld + t.col / kTileCols;
      sums.maximum[at] = m;
      sums.total[at] = sum(total);
      if constexpr (kSmooths) sums.below[at] = sum(below);
      const int64_t wanted = target[r] - first - t.col;
      if (wanted >= 0 && wanted < t.cols) {
        picked[r] = c[wanted];
        if (b) picked[r] += element(b + wanted);
      }
    }
  }
};

// The panels of a block, in order, onto what is known of the row.
template <bool kSmooths>
void add_block(const PanelSums& sums, int64_t r, int64_t classes, RowSums& row) {
  const int64_t n = panels(classes);
  const float *maximum = sums.maximum + r * sums.ld, *total = sums.total + r * sums.ld;
  RowSums block;
  block.raise(largest_lane(largest(maximum, n)));
  Vec all = zero();
  for (int64_t j = 0; j < n; j += kWidth) {
    const Vec d = load(maximum + j, n - j) - broadcast(block.shift());
    all += select(lanes_below(n - j), load(total + j, n - j) * SumOfExponentials::of(d), zero());
  }
  block.total = double{sum(all)};
  block.count = classes;
  if constexpr (kSmooths) {
    for (int64_t i = 0; i < n; ++i) {
      const auto here = static_cast<double>(std::min<int64_t>(kTileCols, classes - i * kTileCols));
      const double shift = maximum[i] == -INFINITY ? 0.0 : double{maximum[i]};
      block.below += double{sums.below[r * sums.ld + i]} + here * (shift - block.shift());
    }
  }
  row.add(block);
}

template <typename T, bool kSmooths>
void forward(const LinearCrossEntropyParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const Counted<T> counted(p);
  const Losses losses(p.options, p.target, p.rows, p.loss);
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.target[r] != p.options.ignore_index) continue;
    losses.ignore(r);
    p.statistics[r] = {0.0f, 0.0f};
  }
  const int64_t rows = counted.count(),
                block = rows > most_few_rows(columns_along_k<D, T>(p.weight)) ? kBlock
                                                                              : kBlockOfFewRows;
  const int64_t ld = round_up(panels(std::min(block, p.classes)), kWidth);
  PanelSums sums{nullptr, nullptr, nullptr, ld};
  RowSums* row_sums;
  float* picked;
  int64_t* target;
  const auto take_all = [&](auto& from) {
    sums.maximum = from.template take<float>(rows * ld);
    sums.total = from.template take<float>(rows * ld);
    sums.below = from.template take<float>(kSmooths ? rows * ld : 0);
    row_sums = from.template take<RowSums>(rows);
    picked = from.template take<float>(rows);
    target = from.template take<int64_t>(rows);
  };
  Scratch scratch(ScratchSize::of(take_all));
  take_all(scratch);
  for (int64_t i = 0; i < rows; ++i) {
    row_sums[i] = {};
    target[i] = p.target[counted[i]];
  }
  constexpr int64_t kUnitRows = 64;
  const auto for_rows = [&](const auto& f) {
    for_units(parallel, ceil_div(rows, kUnitRows), [&](Units& units) {
      for (int64_t u; units.next(u);) {
        for (int64_t i = u * kUnitRows; i < std::min(rows, (u + 1) * kUnitRows); ++i) f(i);
      }
    });
  };
  for_blocks(p.classes, block, [&](int64_t first, int64_t n) {
    const T* const bias = p.bias ? static_cast<const T*>(p.bias) + first : nullptr;
    matmul(parallel, {rows, n, p.channels}, rows_along_k<D, T>(counted.hidden(), p.channels),
           columns_along_k<D, T>(rows_from<T>(p.weight, first)),
           Gathered<T, kSmooths>{bias, target, first, sums, picked});
    for_rows([&](int64_t i) { add_block<kSmooths>(sums, i, n, row_sums[i]); });
  });
  for_rows([&](int64_t i) {
    losses.set(counted[i], row_sums[i], picked[i]);
    p.statistics[counted[i]] = row_sums[i].statistics();
  });
  losses.reduce();
}

// ---- Backward

struct Row {
  RowGradient gradient;
  int64_t target;
};

// C + bias are logits: what is left of them is their gradient, as the next products read it.
template <typename T>
struct LogitsGradient {
  const T* bias;
  const Row* rows;
  int64_t first;
  RowsView dlogits;  // of Kept<T>

  void operator()(const Tile& tile) const {
    const Tile t = tile;
    const T* const b = bias ? bias + t.col : nullptr;
    Kept<T>* to = mutable_row<Kept<T>>(dlogits, t.row) + t.col;
    const int64_t stride = dlogits.stride[0];
    const float* c = t.c;
    for (int64_t r = t.row; r < t.row + t.rows; ++r, c += t.ldc, to += stride) {
      const RowGradient gradient = rows[r].gradient;
      const auto make = [&](int64_t j, int64_t left) __attribute__((always_inline)) {
        const Vec x = b ? load(c + j) + load(b + j, left) : load(c + j);
        return gradient.of<Kept<T>>(x);
      };
      store_row(to, t.cols, make);
      const int64_t at = rows[r].target - first - t.col;
      if (at >= 0 && at < t.cols) {
        const float x = b ? c[at] + element(b + at) : c[at];
        store(to + at, broadcast(gradient.at_target(x)), 1);
      }
    }
  }
};

// A sum of floats over the blocks that needs no second matrix of them: the upper halves lie where
// the result will, in bfloat16, and the lower ones beside it.
struct AccumulatedInHalves {
  RowsView out;    // of bf16
  RowsView lower;  // of uint16_t, whole vectors
  bool first, last;

  void operator()(const Tile& t) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      bf16* const to = mutable_row<bf16>(out, t.row + r) + t.col;
      uint16_t* const low = mutable_row<uint16_t>(lower, t.row + r) + t.col;
      for (int64_t j = 0; j < t.cols; j += kWidth) {
        const int64_t left = t.cols - j;
        Vec v = load(t.c + r * t.ldc + j);
        if (!first) {
          const UVec upper = as<UVec>(load(to + j, left));
          v += as<Vec>(upper | widen(load_bits<HVec>(low + j)));
        }
        if (last) {
          store(to + j, v, left);
          continue;
        }
        const HVec upper = narrow(as<UVec>(v) >> 16);
        std::memcpy(to + j, &upper, std::min<int64_t>(left, kWidth) * sizeof(bf16));
        store_bits(low + j, narrow(as<UVec>(v) & 0xffffu));
      }
    }
  }
};

// Where dhidden is summed up: in place, if every row counts, and what else a sum of floats takes.
template <typename T>
class HiddenSum {
  using Rest = std::conditional_t<std::is_same_v<T, bf16>, uint16_t, float>;
  using Finish = std::conditional_t<std::is_same_v<T, bf16>, AccumulatedInHalves, Accumulated<T>>;

 public:
  HiddenSum(const RowsView& dhidden, const Counted<T>& counted, int64_t rows, int64_t channels)
      : dhidden_(dhidden),
        counted_(counted),
        rows_(rows),
        channels_(channels),
        ld_(round_up(channels, kTileCols)),
        own_(dhidden && !counted.all() ? counted.count() * channels : 0),
        rest_(dhidden && !std::is_same_v<T, float> ? counted.count() * ld_ : 0),
        scratch_(Scratch::bytes<T>(own_) + Scratch::bytes<Rest>(rest_)),
        out_(dhidden) {
    if (own_ > 0) out_ = {scratch_.take<T>(own_), {channels}};
    sum_ = rest_ > 0 ? RowsView{scratch_.take<Rest>(rest_), {ld_}} : out_;
  }
  Finish with(bool first, bool last) const { return {out_, sum_, first, last}; }
  // Puts the rows where they belong, and zeros between them.
  void finish() const {
    if (!dhidden_ || counted_.all()) return;
    for (int64_t r = 0, i = 0; r < rows_; ++r) {
      T* const to = mutable_row<T>(dhidden_, r);
      if (i < counted_.count() && counted_[i] == r) {
        std::memcpy(to, row<T>(out_, i++), channels_ * sizeof(T));
      } else {
        std::fill_n(to, channels_, T{});
      }
    }
  }

 private:
  const RowsView dhidden_;
  const Counted<T>& counted_;
  const int64_t rows_, channels_, ld_, own_, rest_;
  Scratch scratch_;
  RowsView out_, sum_;
};

template <typename T>
void zero_rows(const RowsView& m, int64_t rows, int64_t cols) {
  for (int64_t r = 0; m && r < rows; ++r) std::fill_n(mutable_row<T>(m, r), cols, T{});
}

template <typename T>
void backward(const LinearCrossEntropyGradParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const Counted<T> counted(p);
  const int64_t rows = counted.count(), C = p.channels;
  if (rows == 0 || p.classes == 0) {
    zero_rows<T>(p.dhidden, p.rows, C);
    zero_rows<T>(p.dweight, p.classes, C);
    if (p.dbias) std::fill_n(static_cast<T*>(p.dbias), p.classes, T{});
    return;
  }
  const LossGradients gradients(p.options, p.target, p.rows, p.grad_loss);
  const int64_t ld = round_up(std::min(kBlock, p.classes), 64) + 64 / sizeof(Kept<T>);
  Scratch scratch(Scratch::bytes<Row>(rows) + Scratch::bytes<Kept<T>>(rows * ld));
  Row* const each = scratch.take<Row>(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t r = counted[i];
    each[i] = {RowGradient(p.options, p.statistics[r], gradients.of(r), p.classes), p.target[r]};
  }
  const RowsView dlogits{scratch.take<Kept<T>>(rows * ld), {ld}};
  const int64_t blocks = ceil_div(p.classes, kBlock);
  const Packed<D> hidden(parallel, columns_along_n<D, T>(counted.hidden()), C, rows, kBlock,
                         p.dweight ? blocks : 0);
  const HiddenSum<T> dhidden(p.dhidden, counted, p.rows, C);
  for_blocks(p.classes, kBlock, [&](int64_t first, int64_t n) {
    const RowsView weight = rows_from<T>(p.weight, first);
    const T* const bias = p.bias ? static_cast<const T*>(p.bias) + first : nullptr;
    matmul(parallel, {rows, n, C}, rows_along_k<D, T>(counted.hidden(), C),
           columns_along_k<D, T>(weight), LogitsGradient<T>{bias, each, first, dlogits});
    if (p.dweight) {
      matmul(parallel, {n, C, rows}, rows_along_m<D, Kept<T>>(dlogits), *hidden,
             Stored<T>{rows_from<T>(p.dweight, first)});
    }
    if (p.dbias) {
      BiasGradient<T>(static_cast<T*>(p.dbias) + first, n)
          .template add<Kept<T>>(parallel, dlogits, rows, true, true);
    }
    if (p.dhidden) {
      matmul(parallel, {rows, C, n}, rows_along_k<D, Kept<T>>(dlogits, n),
             columns_along_n<D, T>(weight), dhidden.with(first == 0, first + n == p.classes));
    }
  });
  dhidden.finish();
}

}  // namespace

void linear_cross_entropy_fwd(const LinearCrossEntropyParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    p.options.label_smoothing > 0.0f ? forward<T, true>(p, parallel)
                                     : forward<T, false>(p, parallel);
  });
}

void linear_cross_entropy_bwd(const LinearCrossEntropyGradParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p, parallel); });
}

}  // namespace ft::FT_ISA
