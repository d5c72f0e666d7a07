// How a strip of query rows goes through the forward pass of attention: products with a block of
// keys, softmax, product with their values.
//
// There are two ways to form the softmax. `BoundedStrips` serves rows whose scores are known to be
// small; `OnlineStrips` serves all others, and meets each row's largest score first.
#pragma once
#include <algorithm>
#include <type_traits>

#include "positions.h"
#include "transpose.h"

namespace ft::FT_ISA {

// Rows [row, row + count) of a block of rows against keys [key, key + n).
struct Strip {
  int64_t row, count, key, n;
  bool first;  // no keys were met before
};

// What one worker holds: the packed keys and values of a head, a block of rows, strips of scores.
template <typename T>
struct ForwardBlock {
  using D = Dot<T>;
  using Lane = typename D::Lane;
  static constexpr bool kInPlace = D::kPerLane == 1;  // probabilities are lanes as they stand
  using Probability = Operand<T>;

  ForwardBlock(const AttentionParams& p)
      : p(p),
        dim(p.head_dim),
        value_dim(p.value_dim),
        depth(lanes<D>(dim)),
        padded_dim(round_up(value_dim, kWidth)),
        panel(panel_size<D>(dim)),
        blocks(ForwardBlocks::of<D>(std::max(dim, value_dim))),
        scores_ld(blocks.keys + kWidth),
        scores(p),
        factor(scores.factor()),
        power(factor),
        bounded_power(factor) {}

  template <typename From>
  void take_all(From& from, const Longest& longest) {
    keys = from.template take<Lane>(panels(longest.keys) * panel);
    values = from.template take<Lane>(panels(value_dim) * panel_size<D>(longest.keys));
    queries = from.template take<Lane>(blocks.queries * depth + kWidth);
    out = from.template take<float>(blocks.queries * padded_dim);
    states = from.template take<SoftmaxState>(blocks.queries);
    totals = from.template take<Vec>(blocks.queries);
    rows = from.template take<float>(D::kTileRows * scores_ld);
    panel_scores = from.template take<float>(kInPlace ? 0 : D::kTileRows * kPanelLd);
    draws = from.template take<uint16_t>(draw_space(blocks.keys));
    positions.take_all(from, p, longest, blocks.queries, blocks.keys);
  }

  // Products of a strip's rows with `n` of its keys, from `column` on.
  void multiply_keys(const Strip& s, int64_t column, int64_t n, float* to, int64_t ld) {
    const int64_t at = (s.key + column - first_key) / kTileCols * panel;
    multiply_strip<D>(s.count, n, depth, {queries + s.row * depth, depth, 1}, keys + at, panel, to,
                      ld, false);
  }
  // out += P V.
  void multiply_values(const Strip& s) {
    multiply_strip<D>(s.count, value_dim, lanes<D>(s.n),
                      {reinterpret_cast<const Lane*>(rows), scores_ld, 1},
                      values + (s.key - first_key) / D::kPerLane * kTileCols, value_panel,
                      out + s.row * padded_dim, padded_dim, !s.first);
  }
  static Probability* probabilities(float* row) { return reinterpret_cast<Probability*>(row); }

  const AttentionParams& p;
  const int64_t dim, value_dim, depth, padded_dim, panel;
  const ForwardBlocks blocks;
  const int64_t scores_ld;
  static constexpr int64_t kPanelLd = kTileCols + kWidth;
  const Scores scores;
  const double factor;
  const Power<kPowerDegree<D>> power;
  const BoundedPower<kPowerDegree<D>> bounded_power;
  PositionScores<T> positions;

  int64_t first_key = 0, value_panel = 0;  // of what is packed
  Lane *keys, *values, *queries;
  float *out, *rows, *panel_scores;  // rows: scores, then probabilities, in place
  SoftmaxState* states;
  Vec* totals;  // lane by lane, of rows whose scores are bounded
  uint16_t* draws;
};

// The online softmax. All rows of a strip go through each step together, so that none waits for
// another's end.
template <typename T>
class OnlineStrips {
  using Block = ForwardBlock<T>;
  using D = typename Block::D;

 public:
  OnlineStrips(Block& block, const Sequence& s, const KeyRange& range, int64_t head, int64_t q)
      : b_(block), s_(s), range_(range), head_(head), q_(q) {}

  void meet(const Strip& strip) {
    int64_t seen[D::kTileRows];
    Vec lanes_of[D::kTileRows];
    float of_row[round_up(D::kTileRows, kWidth)];
    b_.multiply_keys(strip, 0, strip.n, b_.rows, b_.scores_ld);
    b_.positions.add(b_.p, s_, q_, strip.row, strip.count, strip.key, strip.n, b_.rows,
                     b_.scores_ld);
    for (int64_t r = 0; r < strip.count; ++r) {
      float* scores = b_.rows + r * b_.scores_ld;
      const int64_t i = q_ + strip.row + r;
      seen[r] = std::clamp<int64_t>(range_.end(i) - strip.key, 0, strip.n);
      const int64_t unseen = std::clamp<int64_t>(range_.begin(i) - strip.key, 0, seen[r]);
      b_.scores.apply({s_, head_, i, strip.key + unseen, seen[r] - unseen}, scores + unseen);
      if (unseen > 0) forbid(scores, unseen);
      lanes_of[r] = largest(scores, seen[r]);
    }
    fold_rows(lanes_of, strip.count, of_row, [](Vec a, Vec b) { return max(a, b); });
    for (int64_t r = 0; r < strip.count; ++r) {
      const float rescale = b_.states[strip.row + r].meet(of_row[r], b_.factor);
      if (rescale != 1.0f && !strip.first) {
        scale_row(b_.out + (strip.row + r) * b_.padded_dim, b_.value_dim, rescale);
      }
    }
    for (int64_t r = 0; r < strip.count; ++r) {
      lanes_of[r] = exponentials_of(strip, r, seen[r]);
    }
    fold_rows(lanes_of, strip.count, of_row, [](Vec a, Vec b) { return a + b; });
    for (int64_t r = 0; r < strip.count; ++r) b_.states[strip.row + r].total += of_row[r];
    b_.multiply_values(strip);
  }

 private:
  Vec exponentials_of(const Strip& strip, int64_t r, int64_t seen) {
    float* scores = b_.rows + r * b_.scores_ld;
    auto* p = Block::probabilities(scores);
    const float shift = b_.states[strip.row + r].shift();
    Vec total;
    if (b_.p.dropout.active()) {
      total = exponentials(scores, seen, shift, b_.power, scores);
      drop_row(q_ + strip.row + r, strip.key, seen, scores, p);
    } else {
      total = exponentials(scores, seen, shift, b_.power, p);
    }
    for (int64_t j = round_up(seen, kWidth); j < round_up(strip.n, kWidth); j += kWidth) {
      store(p + j, zero());
    }
    return total;
  }
  // `to` is where the n probabilities are: what is written lies behind what is still to be read.
  void drop_row(int64_t i, int64_t key, int64_t n, const float* probabilities,
                typename Block::Probability* to) {
    const Dropout& dropout = b_.p.dropout;
    const uint16_t* draws = attention_draws(b_.p, s_, head_, i, key, n, b_.draws);
    for (int64_t j = 0; j < n; j += kWidth) {
      store(to + j, drop(load(probabilities + j), draws + j, dropout.threshold, 1.0f));
    }
  }

  Block& b_;
  const Sequence& s_;
  const KeyRange& range_;
  const int64_t head_, q_;
};

// Where no score can be large, exponentials need no maximum: nothing is subtracted, nothing is ever
// rescaled, and sums stay in lanes until the end. So scores are made a panel of keys at a time and
// become probabilities while they are in L1.
template <typename T>
class BoundedStrips {
  using Block = ForwardBlock<T>;
  using D = typename Block::D;

 public:
  BoundedStrips(Block& block, const Sequence&, const KeyRange& range, int64_t, int64_t q)
      : b_(block), range_(range), q_(q) {}

  void meet(const Strip& strip) {
    const int64_t first = q_ + strip.row, last = first + strip.count - 1;
    Vec totals[D::kTileRows];  // of this block, so that no sum is one long chain
    for (int64_t r = 0; r < strip.count; ++r) totals[r] = zero();
    for (int64_t column = 0; column < strip.n; column += kTileCols) {
      const int64_t n = std::min<int64_t>(kTileCols, strip.n - column), key = strip.key + column;
      float* scores = Block::kInPlace ? b_.rows + column : b_.panel_scores;
      const int64_t ld = Block::kInPlace ? b_.scores_ld : Block::kPanelLd;
      b_.multiply_keys(strip, column, n, scores, ld);
      if (range_.begin(last) <= key && range_.end(first) >= key + kTileCols) {
        for (int64_t r = 0; r < strip.count; ++r) {
          whole(scores + r * ld, Block::probabilities(b_.rows + r * b_.scores_ld) + column,
                totals[r]);
        }
      } else {
        for (int64_t r = 0; r < strip.count; ++r) {
          part(scores + r * ld, Block::probabilities(b_.rows + r * b_.scores_ld) + column,
               totals[r], range_.begin(first + r) - key, range_.end(first + r) - key, n);
        }
      }
    }
    for (int64_t r = 0; r < strip.count; ++r) b_.totals[strip.row + r] += totals[r];
    b_.multiply_values(strip);
  }

 private:
  using Probability = typename Block::Probability;

  // All of a panel's keys.
  FT_INLINE void whole(const float* scores, Probability* to, Vec& total) const {
    Vec p[kTileVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) p[v] = b_.bounded_power(load(scores + v * kWidth));
    Vec sum = total;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; v += 2) {
      store_pair(to + v * kWidth, p[v], p[v + 1]);
      sum += p[v] + p[v + 1];
    }
    total = sum;
  }
  // Those in [begin, end), of n.
  void part(const float* scores, Probability* to, Vec& total, int64_t begin, int64_t end,
            int64_t n) const {
    end = std::min(end, n);
    for (int64_t j = 0; j < n; j += kWidth) {
      Vec p = b_.bounded_power(load(scores + j));
      if (j < begin || j + kWidth > end) {
        p = select(lanes_below(end - j) & ~lanes_below(begin - j), p, zero());
      }
      store(to + j, p);
      total += p;
    }
  }

  Block& b_;
  const KeyRange& range_;
  const int64_t q_;
};

}  // namespace ft::FT_ISA
