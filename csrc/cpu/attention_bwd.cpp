// Gradients of attention without the (T x S) matrix (Dao et al. 2022, algorithm 4): P is made again
// from each row's maximum and sum, a tile of queries x keys at a time.
//
//   P  = softmax(scores)                    dV = drop(P)ᵀ dO
//   dS = P ∘ (drop(dO Vᵀ) − delta + dlse)   dQ = scale · dS K,  dK = scale · dSᵀ Q
//   delta = rowsum(dO ∘ O)
//
// dS is the gradient of a bias; softcap's derivative comes between it and dQ, dK.
// Cost of one head: 10 T S D FLOPs (causal: half), T S exponentials, reads (3 T + 2 S) D elements
// and writes (T + 2 S) D; memory O((T + S) D). One unit of work is all that adds to one gradient,
// so every sum has one order.
#include <algorithm>
#include <type_traits>

#include "positions_grad.h"
#include "scores_grad.h"

namespace ft::FT_ISA {
namespace {

template <typename T>
class Worker {
  using D = Dot<T>;
  using Lane = typename D::Lane;
  static constexpr bool kInPlace = D::kPerLane == 1;  // floats are lanes as they stand
  using Element = Operand<T>;                         // of P and dS
  static constexpr int64_t kKeys = BackwardBlocks<D>::kKeys;
  static constexpr int64_t kQueries = BackwardBlocks<D>::kQueries;
  // floats of P and dS are kept where they are lanes; else those of one strip at a time
  static constexpr int64_t kFloatRows = kInPlace ? kQueries : D::kTileRows;
  static constexpr int64_t kTileLd = kKeys + kWidth;

 public:
  Worker(const AttentionGradParams& g, const Longest& longest)
      : g_(g),
        p_(g.forward),
        dim_(p_.head_dim),
        value_dim_(p_.value_dim),
        depth_(lanes<D>(dim_)),
        value_depth_(lanes<D>(value_dim_)),
        padded_dim_(round_up(dim_, kWidth)),
        padded_value_dim_(round_up(value_dim_, kWidth)),
        group_(p_.heads / p_.kv_heads),
        scores_of_(p_),
        terms_(g, scores_of_),
        power_(scores_of_.factor()),
        query_space_(round_up(longest.queries, kQueries)),
        query_room_(panels(dim_) * panel_size<D>(query_space_)),
        grad_room_(panels(value_dim_) * panel_size<D>(query_space_)),
        scratch_(ScratchSize::of([&](auto& size) { take_all(size, longest); })) {
    take_all(scratch_, longest);
  }

  // All sequences [begin, end) of one key head.
  void run(int64_t begin, int64_t end, int64_t kv_head) {
    position_grads_.begin_head(p_);
    for (int64_t b = begin; b < end; ++b) run(Sequence(p_, b), kv_head);
    position_grads_.end_head(g_, kv_head);
  }

 private:
  template <typename From>
  void take_all(From& from, const Longest& longest) {
    query_rows_ = from.template take<Lane>(group_ * query_space_ * depth_ + kWidth);
    grad_rows_ = from.template take<Lane>(group_ * query_space_ * value_depth_ + kWidth);
    query_panels_ = from.template take<Lane>(group_ * query_room_);
    grad_panels_ = from.template take<Lane>(group_ * grad_room_);
    dq_ = from.template take<float>(group_ * query_space_ * padded_dim_);
    delta_ = from.template take<float>(group_ * query_space_);
    grad_lse_ = from.template take<float>(group_ * query_space_);
    key_panels_ = from.template take<Lane>(panels(kKeys) * panel_size<D>(dim_));
    value_panels_ = from.template take<Lane>(panels(kKeys) * panel_size<D>(value_dim_));
    key_natural_ = from.template take<Lane>(panels(dim_) * panel_size<D>(kKeys));
    dk_ = from.template take<float>(kKeys * padded_dim_);
    dv_ = from.template take<float>(kKeys * padded_value_dim_);
    p_tile_ = from.template take<float>(kFloatRows * kTileLd);
    ds_tile_ = from.template take<float>(kFloatRows * kTileLd);
    p_rows_ = from.template take<T>(kInPlace ? 0 : kQueries * kTileLd);
    ds_rows_ = from.template take<T>(kInPlace ? 0 : kQueries * kTileLd);
    columns_ = from.template take<Lane>(
        kInPlace ? 0 : packed_columns<D>(round_up(kKeys, D::kTileRows), lanes<D>(kQueries)));
    draws_ = from.template take<uint16_t>(draw_space(kKeys));
    slopes_ = from.template take<float>(scores_of_.capped() ? kTileLd : 0);
    positions_.take_all(from, p_, longest, kQueries, kKeys);
    position_grads_.take_all(from, p_, longest, kQueries, kKeys);
  }

  void run(const Sequence& s, int64_t kv_head) {
    const KeyRange range(p_, s);
    const int64_t first_head = kv_head * group_;
    for (int64_t g = 0; g < group_; ++g) {
      pack_queries(s, first_head + g, g);
      std::fill_n(dq_ + g * query_space_ * padded_dim_, s.q_len * padded_dim_, 0.0f);
    }
    positions_.pack_keys(p_, s, kv_head, 0, s.q_len, 0, s.kv_len);
    position_grads_.begin_sequence(p_, s, kv_head, positions_);
    for (int64_t key = 0; key < s.kv_len; key += kKeys) {
      block_of_keys(s, range, kv_head, key, std::min(kKeys, s.kv_len - key));
    }
    for (int64_t g = 0; g < group_; ++g) {
      const float* dq = dq_ + g * query_space_ * padded_dim_;
      for (int64_t i = 0; i < s.q_len; ++i) {
        store_scaled(mutable_row<T>(g_.dq, s.batch, first_head + g, s.first_query + i),
                     dq + i * padded_dim_, dim_, static_cast<float>(p_.scale));
      }
    }
    position_grads_.end_sequence(g_, s, kv_head);
    clear_padding(s, kv_head);
  }

  // Keys outside [key_starts, key_lengths) belong to no sequence, and get no gradient.
  void clear_padding(const Sequence& s, int64_t kv_head) {
    if (p_.cu_seqlens_k) return;
    for (int64_t j = 0; j < p_.kv_len; ++j) {
      if (j >= s.first_key && j < s.first_key + s.kv_len) continue;
      store_zeros(mutable_row<T>(g_.dk, s.batch, kv_head, j), dim_);
      store_zeros(mutable_row<T>(g_.dv, s.batch, kv_head, j), value_dim_);
    }
  }

  // Q and dO of the head, the g-th of its group, both ways round; delta and dlse of its rows.
  void pack_queries(const Sequence& s, int64_t head, int64_t g) {
    const T* q = row<T>(p_.query, s.batch, head, s.first_query);
    const T* grad = row<T>(g_.grad_out, s.batch, head, s.first_query);
    const int64_t q_ld = p_.query.stride[2], grad_ld = g_.grad_out.stride[2];
    const int64_t first = g * query_space_;
    query_panel_ = panel_size<D>(s.q_len);
    pack_rows<D>(q, q_ld, s.q_len, dim_, query_rows_ + first * depth_, depth_);
    pack_rows<D>(grad, grad_ld, s.q_len, value_dim_, grad_rows_ + first * value_depth_,
                 value_depth_);
    pack_natural<D>(q, q_ld, dim_, s.q_len, query_panels_ + g * query_room_);
    pack_natural<D>(grad, grad_ld, value_dim_, s.q_len, grad_panels_ + g * grad_room_);
    const T* out = row<T>(p_.out, s.batch, head, s.first_query);
    const int64_t out_ld = p_.out.stride[2];
    const int64_t at = (s.batch * p_.heads + head) * p_.q_len + s.first_query;
    for (int64_t i = 0; i < s.q_len; ++i) {
      Vec total = zero();
      for (int64_t d = 0; d < value_dim_; d += kWidth) {
        const int64_t left = value_dim_ - d;
        total = fma(load(out + i * out_ld + d, left), load(grad + i * grad_ld + d, left), total);
      }
      delta_[first + i] = sum(total);
      grad_lse_[first + i] = g_.grad_lse ? g_.grad_lse[at + i] : 0.0f;
      if (p_.softmax[2 * (at + i) + 1] == 0.0f) forget(g, i, s.q_len);
    }
  }
  // A row that saw no key: whatever its gradient is, NaN included, none of it goes on.
  void forget(int64_t g, int64_t i, int64_t rows) {
    const int64_t at = g * query_space_ + i;
    delta_[at] = grad_lse_[at] = 0.0f;
    std::fill_n(query_rows_ + at * depth_, depth_, Lane{});
    std::fill_n(grad_rows_ + at * value_depth_, value_depth_, Lane{});
    clear_row<D>(query_panels_ + g * query_room_, dim_, rows, i);
    clear_row<D>(grad_panels_ + g * grad_room_, value_dim_, rows, i);
  }

  // dK and dV of keys [key, key + n), and what they add to the gradients of all rows.
  void block_of_keys(const Sequence& s, const KeyRange& range, int64_t kv_head, int64_t key,
                     int64_t n) {
    const T* k = row<T>(p_.key, s.batch, kv_head, s.first_key + key);
    const T* v = row<T>(p_.value, s.batch, kv_head, s.first_key + key);
    pack_transposed<D>(k, p_.key.stride[2], n, dim_, key_panels_);
    pack_transposed<D>(v, p_.value.stride[2], n, value_dim_, value_panels_);
    pack_natural<D>(k, p_.key.stride[2], dim_, n, key_natural_);
    std::fill_n(dk_, n * padded_dim_, 0.0f);
    std::fill_n(dv_, n * padded_value_dim_, 0.0f);
    // blocks of queries have fixed places, whichever of them sees the first key
    const int64_t first = range.first_row(key) / kQueries * kQueries;
    const int64_t end = std::min(s.q_len, range.end_row(key + n - 1));
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t q = first; q < end; q += kQueries) {
        tile({s, range, kv_head * group_ + g, g, q, std::min(kQueries, s.q_len - q), key, n});
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = s.first_key + key + j;
      store_scaled(mutable_row<T>(g_.dk, s.batch, kv_head, at), dk_ + j * padded_dim_, dim_,
                   static_cast<float>(p_.scale));
      store_scaled(mutable_row<T>(g_.dv, s.batch, kv_head, at), dv_ + j * padded_value_dim_,
                   value_dim_, 1.0f);
    }
  }

  // Rows [q, q + rows) of a head, the g-th of its group, against keys [key, key + n).
  struct Tile {
    const Sequence& s;
    const KeyRange& range;
    int64_t head, g, q, rows, key, n;
  };

  void tile(const Tile& t) {
    positions_.pack_queries(p_, t.s, t.head, t.q, t.rows);
    const int64_t first = t.g * query_space_ + t.q;
    int64_t begin = 0;  // strips before see none of the keys
    for (int64_t i = 0; i < t.rows; i += D::kTileRows) {
      const int64_t count = std::min<int64_t>(D::kTileRows, t.rows - i);
      const int64_t n = seen_by_strip(t, i);
      if (n == 0) {
        begin = i + count;
        continue;
      }
      if (t.key == 0) fetch(t.s, t.head, t.q + i, count);
      float *p = floats(p_tile_, i), *dp = floats(ds_tile_, i);
      multiply_strip<D>(count, n, depth_, {query_rows_ + (first + i) * depth_, depth_, 1},
                        key_panels_, panel_size<D>(dim_), p, kTileLd, false);
      positions_.add(p_, t.s, t.q, i, count, t.key, n, p, kTileLd);
      multiply_strip<D>(count, n, value_depth_,
                        {grad_rows_ + (first + i) * value_depth_, value_depth_, 1}, value_panels_,
                        panel_size<D>(value_dim_), dp, kTileLd, false);
      for (int64_t r = i; r < i + count; ++r) probabilities(t, r);
    }
    const int64_t rows = t.rows - begin;
    if (rows <= 0) return;
    const int64_t query_lane = (t.q + begin) / D::kPerLane * kTileCols;
    add_transposed<T>(p_rows(begin), kTileLd, rows, t.n,
                      grad_panels_ + t.g * grad_room_ + query_lane, query_panel_, value_dim_,
                      columns_, dv_, padded_value_dim_);
    add_transposed<T>(ds_rows(begin), kTileLd, rows, t.n,
                      query_panels_ + t.g * query_room_ + query_lane, query_panel_, dim_, columns_,
                      dk_, padded_dim_);
    constexpr int64_t kLd = kTileLd / D::kPerLane;
    for (int64_t i = begin; i < t.rows; i += D::kTileRows) {
      const auto* a = reinterpret_cast<const Lane*>(ds_rows(i));
      multiply_strip<D>(std::min<int64_t>(D::kTileRows, t.rows - i), dim_,
                        lanes<D>(seen_by_strip(t, i)), {a, kLd, 1}, key_natural_,
                        panel_size<D>(t.n), dq_ + (first + i) * padded_dim_, padded_dim_, true);
    }
    position_grads_.add(p_, t.s, ds_rows(begin), kTileLd, t.q + begin, rows, t.key, t.n);
  }
  // With each strip, rows of its number are fetched of the head that follows.
  void fetch(const Sequence& s, int64_t head, int64_t begin, int64_t count) const {
    if (++head == p_.heads) return;
    fetch_inputs<T>(p_, s, head, begin, count);
    fetch_rows<T>(g_.grad_out, value_dim_, s.batch, head, s.first_query + begin, count);
    fetch_rows<T>(p_.out, value_dim_, s.batch, head, s.first_query + begin, count);
  }
  // Keys of the tile up to the last one that a row of the strip sees.
  static int64_t seen_by_strip(const Tile& t, int64_t i) {
    const int64_t last = std::min<int64_t>(i + D::kTileRows, t.rows) - 1;
    return std::clamp<int64_t>(t.range.end(t.q + last) - t.key, 0, t.n);
  }
  static float* floats(float* tile, int64_t r) {
    return tile + (kInPlace ? r : r % D::kTileRows) * kTileLd;
  }
  // Row r of P and dS of the tile, as products read them.
  Element* p_rows(int64_t r) {
    if constexpr (kInPlace)
      return p_tile_ + r * kTileLd;
    else
      return p_rows_ + r * kTileLd;
  }
  Element* ds_rows(int64_t r) {
    if constexpr (kInPlace)
      return ds_tile_ + r * kTileLd;
    else
      return ds_rows_ + r * kTileLd;
  }

  // Row r of the tile: scores and dO Vᵀ become drop(P) and dS, zeros past the keys that are seen.
  void probabilities(const Tile& t, int64_t r) {
    const int64_t i = t.q + r, first = t.g * query_space_;
    const int64_t all = t.range.end(i), begin = t.range.begin(i);
    const int64_t seen = std::clamp<int64_t>(all - t.key, 0, t.n);
    float *p = floats(p_tile_, r), *dp = floats(ds_tile_, r);
    const int64_t unseen = std::clamp<int64_t>(begin - t.key, 0, seen);
    const ScoreRow score_row{t.s, t.head, i, t.key + unseen, seen - unseen};
    scores_of_.apply(score_row, p + unseen, slopes_);
    if (unseen > 0) forbid(p, unseen);

    const int64_t at = (t.s.batch * p_.heads + t.head) * p_.q_len + t.s.first_query + i;
    const Vec shift = broadcast(p_.softmax[2 * at]);
    const Quotient share(p_.softmax[2 * at + 1]);
    const Dropout& dropout = p_.dropout;
    const uint16_t* draws =
        dropout.active() ? attention_draws(p_, t.s, t.head, i, t.key, seen, draws_) : nullptr;
    bool made = false;  // the probabilities are in place of their scores
    const auto probability = [&](int64_t j) __attribute__((always_inline)) {
      if (made) return load(p + j);
      const Vec power = power_(load(p + j) - shift);
      // rounded to bf16, a probability is as good by one product
      return D::kPerLane == 2 ? Vec(power * share.reciprocal) : share(power);
    };
    const auto gradient = [&](int64_t j) __attribute__((always_inline)) {
      const Vec of_kept = load(dp + j);
      return draws ? drop(of_kept, draws + j, dropout.threshold, dropout.scale) : of_kept;
    };
    float delta = delta_[first + i];
    // A row that sees no key outside of the tile: delta is the sum of P ∘ dP, whose rounding
    // cancels that of dP; with few keys that is the better part of it.
    if (all - begin <= kKeys && begin >= t.key && all <= t.key + t.n) {
      Vec total = zero();
      for (int64_t j = 0; j < seen; j += kWidth) {
        const IVec tail = lanes_below(seen - j);
        const Vec of_p = probability(j);
        store(p + j, of_p);
        total = fma(select(tail, of_p, zero()), select(tail, gradient(j), zero()), total);
      }
      delta = sum(total);
      made = true;
    }
    const Vec subtracted = broadcast(delta), added = broadcast(grad_lse_[first + i]);
    Element *to_p = p_rows(r), *to_ds = ds_rows(r);
    const bool looked_at = terms_.any();
    struct Pair {
      Vec p, ds;
    };
    const auto make = [&](int64_t j) __attribute__((always_inline)) {
      const Vec of_p = probability(j);
      // rounded apart, so that with a single key, where both are alike, nothing is left
      const Vec ds = of_p * ((gradient(j) - subtracted) + added);
      return Pair{draws ? drop(of_p, draws + j, dropout.threshold, dropout.scale) : of_p, ds};
    };
    int64_t j = 0;
    for (; j + 2 * kWidth <= seen; j += 2 * kWidth) {
      const Pair a = make(j), b = make(j + kWidth);
      store_pair(to_p + j, a.p, b.p);
      if (looked_at) {
        store_pair(dp + j, a.ds, b.ds);
      } else {
        store_pair(to_ds + j, a.ds, b.ds);
      }
    }
    for (; j < seen; j += kWidth) {
      const IVec tail = lanes_below(seen - j);
      const Pair a = make(j);
      store(to_p + j, select(tail, a.p, zero()));
      if (looked_at) {
        store(dp + j, select(tail, a.ds, zero()));
      } else {
        store(to_ds + j, select(tail, a.ds, zero()));
      }
    }
    if (looked_at) {
      for (j = 0; j < unseen; j += kWidth) store(to_ds + j, zero(), unseen - j);
      terms_.add(score_row, dp + unseen, slopes_, to_ds + unseen);
      store(to_ds + seen, zero());  // whose vectors begin at `unseen`, those below at multiples
    }
    for (j = round_up(seen, kWidth); j < round_up(t.n, kWidth); j += kWidth) {
      store(to_p + j, zero());
      store(to_ds + j, zero());
    }
  }

  const AttentionGradParams& g_;
  const AttentionParams& p_;
  const int64_t dim_, value_dim_, depth_, value_depth_, padded_dim_, padded_value_dim_, group_;
  const Scores scores_of_;
  const ScoreGradients terms_;
  const Power<kPowerDegree<D>> power_;
  const int64_t query_space_, query_room_, grad_room_;
  int64_t query_panel_ = 0;
  PositionScores<T> positions_;
  PositionGradients<T> position_grads_;
  Scratch scratch_;
  MatrixUnit matrix_unit_;
  Lane *query_rows_, *grad_rows_, *query_panels_, *grad_panels_;
  Lane *key_panels_, *value_panels_, *key_natural_, *columns_;
  float *dq_, *delta_, *grad_lse_, *dk_, *dv_, *p_tile_, *ds_tile_, *slopes_;
  T *p_rows_, *ds_rows_;
  uint16_t* draws_;
};

// One unit is all that adds to one sum: the heads that share a key head; all sequences, where a
// gradient is summed over the batch; all heads, where it is summed over them.
template <typename T>
void differentiate(const AttentionGradParams& g, const Parallel& parallel) {
  const AttentionParams& p = g.forward;
  const Longest longest(p);
  const HeadsView& dbias = g.dbias_of_rows ? g.dbias_of_rows : g.dbias;
  const bool over_batch =
      p.batch > 1 && ((dbias && dbias.stride[0] == 0) || g.ddistance_bias || g.dposition_key);
  const bool over_heads = p.heads > 1 && dbias && dbias.stride[1] == 0;
  const int64_t batch_each = over_batch ? p.batch : 1, heads_each = over_heads ? p.kv_heads : 1;
  const int64_t groups = p.kv_heads / heads_each;
  for_units(parallel, p.batch / batch_each * groups, [&](Units& units) {
    Worker<T> worker(g, longest);
    for (int64_t unit; units.next(unit);) {
      const int64_t begin = unit / groups * batch_each, head = unit % groups * heads_each;
      for (int64_t h = head; h < head + heads_each; ++h) worker.run(begin, begin + batch_each, h);
    }
  });
}

}  // namespace

void attention_bwd(const AttentionGradParams& g, const Parallel& parallel) {
  if (g.forward.batch == 0 || g.forward.kv_heads == 0) return;
  with_storage(g.forward.dtype,
               [&](auto storage) { differentiate<decltype(storage)>(g, parallel); });
}

}  // namespace ft::FT_ISA
