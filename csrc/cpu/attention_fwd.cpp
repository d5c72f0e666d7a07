// out = softmax(Q Kᵀ · scale + bias) V without the (T x S) matrix: FlashAttention (Dao et al. 2022)
// on the CPU. A strip of D::kTileRows query rows meets a block of keys at a time; its scores live
// in L1, K and V of the block, packed once per head, in L2. Cost of one head: 4 T S D FLOPs
// (causal: half), T S exponentials, reads (T + 2 S) D elements and writes T D; memory O((T + S) D).
#include <algorithm>
#include <type_traits>

#include "attention_blocks.h"
#include "transpose.h"

namespace ft::FT_ISA {
namespace {

// What one worker needs: the packed keys and values of a head, a block of rows, a strip of scores.
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
        depth_(lanes<D>(dim_)),
        padded_dim_(round_up(dim_, kWidth)),
        factor_(softmax_factor(p)),
        power_(factor_),
        blocks_(ForwardBlocks::of<D>(dim_)),
        scores_ld_(blocks_.keys + kWidth),
        panel_(panel_size<D>(dim_)),
        scratch_(ScratchSize::of([&](auto& size) { take_all(size, longest); })) {
    take_all(scratch_, longest);
  }

  // Rows [begin, end) of blocks of queries of one head.
  void run(const Sequence& s, int64_t head, int64_t begin_block, int64_t end_block) {
    const int64_t end = std::min(s.q_len, end_block * blocks_.queries);
    if (begin_block * blocks_.queries >= end) return;
    const KeyLimit limit(p_, s);
    const int64_t keys = limit.of_row(end - 1);  // later ones are seen by no row
    value_panel_ = panel_size<D>(keys);
    pack_transposed<D>(row<T>(p_.key, s.batch, head, s.first_key), p_.key.stride[2], keys, dim_,
                       keys_);
    // whole lanes, if the sequence has them: what is in a lane must not depend on where pieces end
    pack_natural<D>(row<T>(p_.value, s.batch, head, s.first_key), p_.value.stride[2], dim_,
                    std::min(s.kv_len, round_up(keys, D::kPerLane)), values_);
    for (int64_t q = begin_block * blocks_.queries; q < end; q += blocks_.queries) {
      block_of_rows(s, limit, head, q, std::min(blocks_.queries, end - q));
    }
  }

 private:
  // Rows of one head lie too far apart for the hardware to see the next ones coming. So with each
  // strip, rows of its number are fetched: of the output, and of the head that follows.
  void fetch(const Sequence& s, int64_t head, int64_t begin, int64_t count) const {
    fetch(p_.out, s.batch, head, s.first_query + begin, count);
    if (head + 1 == p_.heads) return;
    fetch(p_.query, s.batch, head + 1, s.first_query + begin, count);
    count = std::min(count, s.kv_len - begin);
    fetch(p_.key, s.batch, head + 1, s.first_key + begin, count);
    fetch(p_.value, s.batch, head + 1, s.first_key + begin, count);
  }
  void fetch(const HeadsView& v, int64_t batch, int64_t head, int64_t begin, int64_t count) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = begin; i < begin + count; ++i) {
      const T* at = row<T>(v, batch, head, i);
      for (int64_t d = 0; d < dim_; d += kLine) __builtin_prefetch(at + d);
    }
  }

  template <typename From>
  void take_all(From& from, const Longest& longest) {
    keys_ = from.template take<Lane>(panels(longest.keys) * panel_);
    values_ = from.template take<Lane>(panels(dim_) * panel_size<D>(longest.keys));
    queries_ = from.template take<Lane>(blocks_.queries * depth_ + kWidth);
    out_ = from.template take<float>(blocks_.queries * padded_dim_);
    states_ = from.template take<SoftmaxState>(blocks_.queries);
    scores_ = from.template take<float>(D::kTileRows * scores_ld_);
    probabilities_ = from.template take<Lane>(D::kTileRows * scores_ld_);
    draws_ = from.template take<uint16_t>(draw_space(blocks_.keys));
  }

  void block_of_rows(const Sequence& s, const KeyLimit& limit, int64_t head, int64_t q,
                     int64_t rows) {
    pack_rows<D>(row<T>(p_.query, s.batch, head, s.first_query + q), p_.query.stride[2], rows, dim_,
                 queries_, depth_);
    for (int64_t i = 0; i < rows; ++i) states_[i] = {};
    const int64_t keys = limit.of_row(q + rows - 1);
    for (int64_t key = 0; key < keys; key += blocks_.keys) {
      for (int64_t i = 0; i < rows; i += D::kTileRows) {
        const int64_t count = std::min<int64_t>(D::kTileRows, rows - i);
        const int64_t n = std::min(blocks_.keys, limit.of_row(q + i + count - 1) - key);
        if (key == 0) fetch(s, head, q + i, count);
        if (n > 0) strip(s, limit, head, q, i, count, key, n);
      }
    }
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
    if (states_[i].total == 0.0f) return store_zeros(out, dim_);
    const Quotient share(states_[i].total);
    const float kept = p_.dropout.active() ? p_.dropout.scale : 1.0f;
    const float* from = out_ + i * padded_dim_;
    for (int64_t d = 0; d < dim_; d += kWidth) {
      store(out + d, share.of_any(load(from + d)) * kept, dim_ - d);
    }
  }

  // Rows q + i … of the block against keys [key, key + n), of which each row sees its own part.
  void strip(const Sequence& s, const KeyLimit& limit, int64_t head, int64_t q, int64_t i,
             int64_t count, int64_t key, int64_t n) {
    multiply_strip<D>(count, n, depth_, {queries_ + i * depth_, depth_, 1},
                      keys_ + key / kTileCols * panel_, panel_, scores_, scores_ld_, false);
    // All rows of the strip go through each step together, so that none waits for another's end.
    int64_t seen[D::kTileRows];
    Vec lanes_of[D::kTileRows];
    float of_row[round_up(D::kTileRows, kWidth)];
    for (int64_t r = 0; r < count; ++r) {
      float* scores = scores_ + r * scores_ld_;
      seen[r] = std::max<int64_t>(0, std::min(n, limit.of_row(q + i + r) - key));
      scale_and_bias(p_, s, head, q + i + r, key, seen[r], scores);
      lanes_of[r] = largest(scores, seen[r]);
    }
    fold_rows(lanes_of, count, of_row, [](Vec a, Vec b) { return max(a, b); });
    for (int64_t r = 0; r < count; ++r) {
      const float rescale = states_[i + r].meet(of_row[r], factor_);
      if (rescale != 1.0f && key > 0) scale_row(out_ + (i + r) * padded_dim_, dim_, rescale);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* scores = scores_ + r * scores_ld_;
      auto* p = reinterpret_cast<Probability*>(kInPlace ? reinterpret_cast<Lane*>(scores)
                                                        : probabilities_ + r * scores_ld_);
      const float shift = states_[i + r].shift();
      if (p_.dropout.active()) {
        lanes_of[r] = exponentials(scores, seen[r], shift, power_, scores);
        drop_row(s, head, q + i + r, key, seen[r], scores, p);
      } else {
        lanes_of[r] = exponentials(scores, seen[r], shift, power_, p);
      }
      for (int64_t j = round_up(seen[r], kWidth); j < round_up(n, kWidth); j += kWidth) {
        store(p + j, zero());
      }
    }
    fold_rows(lanes_of, count, of_row, [](Vec a, Vec b) { return a + b; });
    for (int64_t r = 0; r < count; ++r) states_[i + r].total += of_row[r];
    const Lane* p = kInPlace ? reinterpret_cast<const Lane*>(scores_) : probabilities_;
    multiply_strip<D>(count, dim_, lanes<D>(n), {p, scores_ld_, 1},
                      values_ + key / D::kPerLane * kTileCols, value_panel_, out_ + i * padded_dim_,
                      padded_dim_, key > 0);
  }

  // `to` may be where the n probabilities are.
  void drop_row(const Sequence& s, int64_t head, int64_t i, int64_t key, int64_t n,
                const float* probabilities, Probability* to) {
    const uint16_t* draws = attention_draws(p_, s, head, i, key, n, draws_);
    for (int64_t j = 0; j < n; j += kWidth) {
      store(to + j, drop(load(probabilities + j), draws + j, p_.dropout.threshold, 1.0f));
    }
  }

  const AttentionParams& p_;
  const int64_t dim_, depth_, padded_dim_;
  const double factor_;
  const Power<D::kPerLane == 2 ? 3 : 6> power_;
  const ForwardBlocks blocks_;
  const int64_t scores_ld_, panel_;
  int64_t value_panel_ = 0;
  Scratch scratch_;
  MatrixUnit matrix_unit_;
  Lane *keys_, *values_, *queries_, *probabilities_;
  float *out_, *scores_;
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
  const int64_t row_blocks =
      ceil_div(longest.queries, ForwardBlocks::of<Dot<T>>(p.head_dim).queries);
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
