// out = softmax(scores) V without the (T x S) matrix: FlashAttention (Dao et al. 2022) on the CPU.
// A strip of D::kTileRows query rows meets a block of keys at a time; its scores live in L1, K and
// V of the block, packed once per key head, in L2. Cost of one head: 4 T S D FLOPs (causal: half),
// T S exponentials, reads (T + 2 S) D elements and writes T D; memory O((T + S) D).
//
// The matrix unit and the vector unit are two processors: while one strip's softmax is formed, the
// products of its neighbours run. So strips go through a pipeline of three stages.
#include <algorithm>
#include <type_traits>

#include "positions.h"
#include "transpose.h"

namespace ft::FT_ISA {
namespace {

// Rows [row, row + count) of a block of rows against keys [key, key + n).
struct Strip {
  int64_t row = 0, count = 0, key = 0, n = 0;
  bool first = false;       // no keys were met before
  float* scores = nullptr;  // then probabilities, in place
};

// What one worker needs: the packed keys and values of a head, a block of rows, strips of scores.
template <typename T>
class Worker {
  using D = Dot<T>;
  using Lane = typename D::Lane;
  static constexpr bool kInPlace = D::kPerLane == 1;  // probabilities are lanes as they stand
  using Probability = std::conditional_t<kInPlace, float, T>;

 public:
  Worker(const AttentionParams& p, const Longest& longest)
      : p_(p),
        dim_(p.head_dim),
        value_dim_(p.value_dim),
        depth_(lanes<D>(dim_)),
        padded_dim_(round_up(value_dim_, kWidth)),
        group_(p.heads / p.kv_heads),
        scores_of_(p),
        factor_(scores_of_.factor()),
        power_(factor_),
        blocks_(ForwardBlocks::of<D>(std::max(dim_, value_dim_))),
        scores_ld_(blocks_.keys + kWidth),
        panel_(panel_size<D>(dim_)),
        scratch_(ScratchSize::of([&](auto& size) { take_all(size, longest); })) {
    take_all(scratch_, longest);
  }

  // Rows [begin, end) of blocks of queries of one head.
  void run(const Sequence& s, int64_t head, int64_t begin_block, int64_t end_block) {
    const int64_t begin = begin_block * blocks_.queries;
    const int64_t end = std::min(s.q_len, end_block * blocks_.queries);
    if (begin >= end) return;
    const KeyRange range(p_, s);
    pack_keys(s, head / group_, range.begin(begin) / blocks_.keys * blocks_.keys,
              range.end(end - 1));
    positions_.pack_keys(p_, s, head, begin, end, packed_.begin, packed_.end);
    for (int64_t q = begin; q < end; q += blocks_.queries) {
      block_of_rows(s, range, head, q, std::min(blocks_.queries, end - q));
    }
  }

 private:
  template <typename From>
  void take_all(From& from, const Longest& longest) {
    keys_ = from.template take<Lane>(panels(longest.keys) * panel_);
    values_ = from.template take<Lane>(panels(value_dim_) * panel_size<D>(longest.keys));
    queries_ = from.template take<Lane>(blocks_.queries * depth_ + kWidth);
    out_ = from.template take<float>(blocks_.queries * padded_dim_);
    states_ = from.template take<SoftmaxState>(blocks_.queries);
    for (float*& scores : strips_) scores = from.template take<float>(D::kTileRows * scores_ld_);
    draws_ = from.template take<uint16_t>(draw_space(blocks_.keys));
    positions_.take_all(from, p_, longest, blocks_.queries, blocks_.keys);
  }

  // Keys [begin, end) of the sequence, unless a head of the same group has just packed them.
  struct Packed {
    int64_t sequence = -1, head = -1, begin = 0, end = 0;
    bool operator==(const Packed&) const = default;
  };
  void pack_keys(const Sequence& s, int64_t head, int64_t begin, int64_t end) {
    const Packed wanted{s.index, head, std::min(begin, end), end};
    if (wanted == packed_) return;
    packed_ = wanted;
    const int64_t keys = end - packed_.begin, first = s.first_key + packed_.begin;
    value_panel_ = panel_size<D>(keys);
    pack_transposed<D>(row<T>(p_.key, s.batch, head, first), p_.key.stride[2], keys, dim_, keys_);
    // whole lanes, if the sequence has them: what is in a lane must not depend on where pieces end
    pack_natural<D>(row<T>(p_.value, s.batch, head, first), p_.value.stride[2], value_dim_,
                    std::min(s.kv_len - packed_.begin, round_up(keys, D::kPerLane)), values_);
  }

  // Rows of one head lie too far apart for the hardware to see the next ones coming. So with each
  // strip, rows of its number are fetched: of the output, and of the head that follows.
  void fetch(const Sequence& s, int64_t head, int64_t begin, int64_t count) const {
    fetch(p_.out, value_dim_, s.batch, head, s.first_query + begin, count);
    if (head + 1 == p_.heads) return;
    fetch(p_.query, dim_, s.batch, head + 1, s.first_query + begin, count);
    const int64_t next = (head + 1) / group_;
    if (next == head / group_) return;
    count = std::min(count, s.kv_len - begin);
    fetch(p_.key, dim_, s.batch, next, s.first_key + begin, count);
    fetch(p_.value, value_dim_, s.batch, next, s.first_key + begin, count);
  }
  static void fetch(const HeadsView& v, int64_t dim, int64_t batch, int64_t head, int64_t begin,
                    int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = begin; i < begin + count; ++i) {
      const T* at = row<T>(v, batch, head, i);
      for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(at + d);
    }
  }

  void block_of_rows(const Sequence& s, const KeyRange& range, int64_t head, int64_t q,
                     int64_t rows) {
    pack_rows<D>(row<T>(p_.query, s.batch, head, s.first_query + q), p_.query.stride[2], rows, dim_,
                 queries_, depth_);
    positions_.pack_queries(p_, s, head, q, rows);
    std::fill_n(states_, rows, SoftmaxState{});
    Pipeline pipeline(*this, s, range, head, q);
    const int64_t keys = range.end(q + rows - 1);
    int64_t fetched = 0;
    for (int64_t key = range.begin(q) / blocks_.keys * blocks_.keys; key < keys;
         key += blocks_.keys) {
      for (int64_t i = 0; i < rows; i += D::kTileRows) {
        const int64_t count = std::min<int64_t>(D::kTileRows, rows - i);
        const int64_t n = std::min(blocks_.keys, range.end(q + i + count - 1) - key);
        const int64_t begin = range.begin(q + i);
        if (fetched < rows) fetch(s, head, q + i, count);
        fetched += count;
        if (n > 0 && begin < key + n) pipeline.push({i, count, key, n, begin >= key});
      }
    }
    pipeline.end();
    for (int64_t i = 0; i < rows; ++i) {
      finish_row(mutable_row<T>(p_.out, s.batch, head, s.first_query + q + i), i);
      const SoftmaxState& state = states_[i];
      const int64_t at = (s.batch * p_.heads + head) * p_.q_len + s.first_query + q + i;
      p_.lse[at] = state.logsumexp(factor_);
      if (p_.softmax) {
        p_.softmax[2 * at] = state.shift();
        p_.softmax[2 * at + 1] = state.total;
      }
    }
  }

  // The gathered output of row i of the block over the sum of its exponentials.
  void finish_row(T* out, int64_t i) {
    if (states_[i].total == 0.0f) return store_zeros(out, value_dim_);
    const Quotient share(states_[i].total);
    const float kept = p_.dropout.active() ? p_.dropout.scale : 1.0f;
    const float* from = out_ + i * padded_dim_;
    for (int64_t d = 0; d < value_dim_; d += kWidth) {
      store(out + d, share.of_any(load(from + d)) * kept, value_dim_ - d);
    }
  }

  // The strips of one block of rows on their way: products of one, softmax of the one before, and
  // values of the one before that. In each turn the softmax goes between the steps of the two
  // products, if those are the matrix unit's, and after them.
  class Pipeline {
   public:
    Pipeline(Worker& worker, const Sequence& s, const KeyRange& range, int64_t head, int64_t q)
        : w_(worker), s_(s), range_(range), head_(head), q_(q) {}

    void push(Strip next) {
      turn(&next);
      previous_ = current_;
      current_ = next;
    }
    void end() {
      turn(nullptr);
      if (current_.count > 0) values(current_, {});
    }

   private:
    void turn(Strip* next) {
      piece_ = current_.count > 0 ? 0 : pieces();
      // the softmax may rescale what its own rows have gathered
      const bool apart = previous_.row != current_.row;
      const int64_t steps = (previous_.count > 0 && apart ? value_steps(previous_) : 0) +
                            (next ? product_steps(*next) : 0);
      spent_ = due_ = 0;
      due_each_ =
          steps > 0 ? ceil_div(current_.count * (kMaximumCost + kExponentialsCost), steps) : 0;
      const Meanwhile softmax{this, some};
      if (previous_.count > 0) values(previous_, apart ? softmax : Meanwhile{});
      if (next) {
        next->scores = w_.strips_[buffer_ ^= 1];
        products(*next, softmax);
      }
      while (piece_ < pieces()) softmax_piece();
    }

    void products(const Strip& p, const Meanwhile& meanwhile) {
      const int64_t panel = (p.key - w_.packed_.begin) / kTileCols * w_.panel_;
      multiply_strip<D>(p.count, p.n, w_.depth_, {w_.queries_ + p.row * w_.depth_, w_.depth_, 1},
                        w_.keys_ + panel, w_.panel_, p.scores, w_.scores_ld_, false, meanwhile);
      w_.positions_.add(w_.p_, s_, q_, p.row, p.count, p.key, p.n, p.scores, w_.scores_ld_);
    }
    void values(const Strip& p, const Meanwhile& meanwhile) {
      const int64_t lane = (p.key - w_.packed_.begin) / D::kPerLane * kTileCols;
      multiply_strip<D>(p.count, w_.value_dim_, lanes<D>(p.n),
                        {reinterpret_cast<const Lane*>(p.scores), w_.scores_ld_, 1},
                        w_.values_ + lane, w_.value_panel_, w_.out_ + p.row * w_.padded_dim_,
                        w_.padded_dim_, !p.first, meanwhile);
    }

    // The softmax of the current strip in pieces: the largest score of every row, the new maxima,
    // the exponentials of every row, their sums. All rows go through each of these together, so
    // that none waits for another's end.
    int64_t pieces() const { return 2 * current_.count + 2; }
    void softmax_piece() {
      const int64_t count = current_.count, piece = piece_++;
      if (piece < count) {
        maximum(piece);
        spent_ += kMaximumCost;
      } else if (piece == count) {
        meet();
      } else if (piece <= 2 * count) {
        exponentials_of(piece - count - 1);
        spent_ += kExponentialsCost;
      } else {
        fold_rows(lanes_of_, count, of_row_, [](Vec a, Vec b) { return a + b; });
        for (int64_t r = 0; r < count; ++r) w_.states_[current_.row + r].total += of_row_[r];
      }
    }
    void maximum(int64_t r) {
      const Strip& c = current_;
      float* scores = c.scores + r * w_.scores_ld_;
      const int64_t i = q_ + c.row + r;
      seen_[r] = std::clamp<int64_t>(range_.end(i) - c.key, 0, c.n);
      const int64_t unseen = std::clamp<int64_t>(range_.begin(i) - c.key, 0, seen_[r]);
      w_.scores_of_.apply({s_, head_, i, c.key + unseen, seen_[r] - unseen}, scores + unseen);
      if (unseen > 0) forbid(scores, unseen);
      lanes_of_[r] = largest(scores, seen_[r]);
    }
    void meet() {
      const Strip& c = current_;
      fold_rows(lanes_of_, c.count, of_row_, [](Vec a, Vec b) { return max(a, b); });
      for (int64_t r = 0; r < c.count; ++r) {
        const float rescale = w_.states_[c.row + r].meet(of_row_[r], w_.factor_);
        if (rescale != 1.0f && !c.first) {
          scale_row(w_.out_ + (c.row + r) * w_.padded_dim_, w_.value_dim_, rescale);
        }
      }
    }
    void exponentials_of(int64_t r) {
      const Strip& c = current_;
      float* scores = c.scores + r * w_.scores_ld_;
      auto* p = reinterpret_cast<Probability*>(scores);
      const float shift = w_.states_[c.row + r].shift();
      if (w_.p_.dropout.active()) {
        lanes_of_[r] = exponentials(scores, seen_[r], shift, w_.power_, scores);
        drop_row(q_ + c.row + r, seen_[r], scores, p);
      } else {
        lanes_of_[r] = exponentials(scores, seen_[r], shift, w_.power_, p);
      }
      for (int64_t j = round_up(seen_[r], kWidth); j < round_up(c.n, kWidth); j += kWidth) {
        store(p + j, zero());
      }
    }
    // `to` is where the n probabilities are: what is written lies behind what is still to be read.
    void drop_row(int64_t i, int64_t n, const float* probabilities, Probability* to) {
      const Dropout& dropout = w_.p_.dropout;
      const uint16_t* draws = attention_draws(w_.p_, s_, head_, i, current_.key, n, w_.draws_);
      for (int64_t j = 0; j < n; j += kWidth) {
        store(to + j, drop(load(probabilities + j), draws + j, dropout.threshold, 1.0f));
      }
    }

    // What is done at one step of the matrix unit, so that the pieces are spread evenly over all.
    static constexpr int64_t kMaximumCost = 16, kExponentialsCost = 64;
    int64_t product_steps(const Strip& p) const {
      return ceil_div(p.n, kMatrixCols) * ceil_div(w_.depth_, kMatrixStep);
    }
    int64_t value_steps(const Strip& p) const {
      return ceil_div(w_.value_dim_, kMatrixCols) * ceil_div(lanes<D>(p.n), kMatrixStep);
    }
    static void some(void* context) {
      auto& pipeline = *static_cast<Pipeline*>(context);
      pipeline.due_ += pipeline.due_each_;
      while (pipeline.spent_ < pipeline.due_ && pipeline.piece_ < pipeline.pieces()) {
        pipeline.softmax_piece();
      }
    }

    Worker& w_;
    const Sequence& s_;
    const KeyRange& range_;
    const int64_t head_, q_;
    Strip previous_, current_;
    int buffer_ = 0;
    int64_t piece_ = 0, spent_ = 0, due_ = 0, due_each_ = 0;
    int64_t seen_[D::kTileRows];
    Vec lanes_of_[D::kTileRows];
    float of_row_[round_up(D::kTileRows, kWidth)];
  };

  const AttentionParams& p_;
  const int64_t dim_, value_dim_, depth_, padded_dim_, group_;
  const Scores scores_of_;
  const double factor_;
  const Power<D::kPerLane == 2 ? 3 : 6> power_;
  const ForwardBlocks blocks_;
  const int64_t scores_ld_, panel_;
  int64_t value_panel_ = 0;
  Packed packed_;
  PositionScores<T> positions_;
  Scratch scratch_;
  MatrixUnit matrix_unit_;
  Lane *keys_, *values_, *queries_;
  float *out_, *strips_[2];
  SoftmaxState* states_;
  uint16_t* draws_;
};

template <typename T>
void attend(const AttentionParams& p, const Parallel& parallel) {
  const Longest longest(p);
  // A unit packs a head's keys once, and takes neighbouring heads in turn: their rows share cache
  // lines and pages. Where there are too few heads to keep all threads busy, the rows of a head are
  // cut in pieces, and each packs the keys again.
  constexpr int64_t kUnitsPerThread = 4;
  const int64_t wanted = parallel.threads == 1 ? 1 : kUnitsPerThread * parallel.threads;
  const int64_t row_blocks = ceil_div(
      longest.queries, ForwardBlocks::of<Dot<T>>(std::max(p.head_dim, p.value_dim)).queries);
  const int64_t heads = p.batch * p.heads;
  if (heads == 0 || row_blocks == 0) return;
  const int64_t pieces = heads >= wanted ? 1 : std::min(row_blocks, ceil_div(wanted, heads));
  const int64_t blocks_each = ceil_div(row_blocks, pieces);
  const int64_t heads_each = std::clamp<int64_t>(heads / wanted, 1, p.heads);
  const int64_t groups = ceil_div(p.heads, heads_each);
  for_units(parallel, p.batch * groups * pieces, [&](Units& units) {
    Worker<T> worker(p, longest);
    for (int64_t unit; units.next(unit);) {
      const int64_t piece = unit % pieces, group = unit / pieces % groups;
      const Sequence s(p, unit / pieces / groups);
      const int64_t end = std::min(p.heads, (group + 1) * heads_each);
      for (int64_t head = group * heads_each; head < end; ++head) {
        worker.run(s, head, piece * blocks_each, (piece + 1) * blocks_each);
      }
    }
  });
}

}  // namespace

void attention_fwd(const AttentionParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) { attend<decltype(storage)>(p, parallel); });
}

}  // namespace ft::FT_ISA
