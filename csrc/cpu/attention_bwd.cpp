// Gradients of attention without the (T x S) matrix (Dao et al. 2022, algorithm 4): P is made again
// from each row's maximum and sum, a tile of queries x keys at a time.
//
//   P  = softmax(Q Kᵀ · scale + bias)       dV = drop(P)ᵀ dO
//   dS = P ∘ (drop(dO Vᵀ) − delta + dlse)   dQ = scale · dS K,  dK = scale · dSᵀ Q
//   delta = rowsum(dO ∘ O)
//
// Cost of one head: 10 T S D FLOPs (causal: half), T S exponentials, reads (3 T + 2 S) D elements
// and writes (T + 2 S) D; memory O((T + S) D). One unit of work is one head, so every sum has one
// order.
#include <algorithm>

#include "attention_blocks.h"

namespace ft::FT_ISA {
namespace {

template <typename T>
class Worker {
  using D = Dot<T>;
  using Lane = typename D::Lane;
  static constexpr bool kInPlace = D::kPerLane == 1;  // floats are lanes as they stand
  static constexpr int64_t kKeys = BackwardBlocks::kKeys, kQueries = BackwardBlocks::kQueries;
  static constexpr int64_t kTileLd = kKeys + kWidth;

 public:
  Worker(const AttentionGradParams& g, const Longest& longest)
      : g_(g),
        p_(g.forward),
        dim_(p_.head_dim),
        depth_(lanes<D>(dim_)),
        padded_dim_(round_up(dim_, kWidth)),
        power_(softmax_factor(p_)),
        query_space_(round_up(longest.queries, kQueries)),
        scratch_(ScratchSize::of([&](auto& size) { take_all(size); })) {
    take_all(scratch_);
  }

  void run(const Sequence& s, int64_t head) {
    const KeyLimit limit(p_, s);
    pack_queries(s, head);
    std::fill_n(dq_, s.q_len * padded_dim_, 0.0f);
    for (int64_t key = 0; key < s.kv_len; key += kKeys) {
      block_of_keys(s, limit, head, key, std::min(kKeys, s.kv_len - key));
    }
    const auto scale = static_cast<float>(p_.scale);
    for (int64_t i = 0; i < s.q_len; ++i) {
      T* dq = mutable_row<T>(g_.dq, s.batch, head, s.first_query + i);
      store_scaled(dq, dq_ + i * padded_dim_, scale);
    }
  }

 private:
  template <typename From>
  void take_all(From& from) {
    const int64_t panel = panels(dim_) * panel_size<D>(query_space_);
    query_rows_ = from.template take<Lane>(query_space_ * depth_ + kWidth);
    grad_rows_ = from.template take<Lane>(query_space_ * depth_ + kWidth);
    query_panels_ = from.template take<Lane>(panel);
    grad_panels_ = from.template take<Lane>(panel);
    dq_ = from.template take<float>(query_space_ * padded_dim_);
    delta_ = from.template take<float>(query_space_);
    grad_lse_ = from.template take<float>(query_space_);
    key_panels_ = from.template take<Lane>(panels(kKeys) * panel_size<D>(dim_));
    value_panels_ = from.template take<Lane>(panels(kKeys) * panel_size<D>(dim_));
    key_natural_ = from.template take<Lane>(panels(dim_) * panel_size<D>(kKeys));
    dk_ = from.template take<float>(kKeys * padded_dim_);
    dv_ = from.template take<float>(kKeys * padded_dim_);
    p_tile_ = from.template take<float>(kQueries * kTileLd);
    ds_tile_ = from.template take<float>(kQueries * kTileLd);
    rows_ = from.template take<T>(kInPlace ? 0 : 2 * kQueries * kTileLd);
    columns_ = from.template take<Lane>(
        kInPlace ? 0 : packed_columns<D>(round_up(kKeys, D::kTileRows), lanes<D>(kQueries)));
    draws_ = from.template take<uint16_t>(draw_space(kKeys));
  }

  // Q and dO of the head both ways round, delta and dlse of its rows.
  void pack_queries(const Sequence& s, int64_t head) {
    const T* q = row<T>(p_.query, s.batch, head, s.first_query);
    const T* grad = row<T>(g_.grad_out, s.batch, head, s.first_query);
    const int64_t q_ld = p_.query.stride[2], grad_ld = g_.grad_out.stride[2];
    query_panel_ = panel_size<D>(s.q_len);
    pack_rows<D>(q, q_ld, s.q_len, dim_, query_rows_, depth_);
    pack_rows<D>(grad, grad_ld, s.q_len, dim_, grad_rows_, depth_);
    pack_natural<D>(q, q_ld, dim_, s.q_len, query_panels_);
    pack_natural<D>(grad, grad_ld, dim_, s.q_len, grad_panels_);
    const T* out = row<T>(p_.out, s.batch, head, s.first_query);
    const int64_t out_ld = p_.out.stride[2];
    const int64_t at = (s.batch * p_.heads + head) * p_.q_len + s.first_query;
    for (int64_t i = 0; i < s.q_len; ++i) {
      Vec total = zero();
      for (int64_t d = 0; d < dim_; d += kWidth) {
        const int64_t left = dim_ - d;
        total = fma(load(out + i * out_ld + d, left), load(grad + i * grad_ld + d, left), total);
      }
      delta_[i] = sum(total);
      grad_lse_[i] = g_.grad_lse ? g_.grad_lse[at + i] : 0.0f;
      if (p_.softmax[2 * (at + i) + 1] == 0.0f) forget(i, s.q_len);
    }
  }
  // A row that saw no key: whatever its gradient is, NaN included, none of it goes on.
  void forget(int64_t i, int64_t rows) {
    delta_[i] = grad_lse_[i] = 0.0f;
    std::fill_n(query_rows_ + i * depth_, depth_, Lane{});
    std::fill_n(grad_rows_ + i * depth_, depth_, Lane{});
    clear_row<D>(query_panels_, dim_, rows, i);
    clear_row<D>(grad_panels_, dim_, rows, i);
  }

  // dK and dV of keys [key, key + n), and what they add to dQ.
  void block_of_keys(const Sequence& s, const KeyLimit& limit, int64_t head, int64_t key,
                     int64_t n) {
    const T* k = row<T>(p_.key, s.batch, head, s.first_key + key);
    const T* v = row<T>(p_.value, s.batch, head, s.first_key + key);
    pack_transposed<D>(k, p_.key.stride[2], n, dim_, key_panels_);
    pack_transposed<D>(v, p_.value.stride[2], n, dim_, value_panels_);
    pack_natural<D>(k, p_.key.stride[2], dim_, n, key_natural_);
    std::fill_n(dk_, n * padded_dim_, 0.0f);
    std::fill_n(dv_, n * padded_dim_, 0.0f);
    // blocks of queries have fixed places, whichever of them sees the first key
    const int64_t first = limit.first_row(key) / kQueries * kQueries;
    for (int64_t q = first; q < s.q_len; q += kQueries) {
      tile(s, limit, head, q, std::min(kQueries, s.q_len - q), key, n);
    }
    const auto scale = static_cast<float>(p_.scale);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = s.first_key + key + j;
      store_scaled(mutable_row<T>(g_.dk, s.batch, head, at), dk_ + j * padded_dim_, scale);
      store_scaled(mutable_row<T>(g_.dv, s.batch, head, at), dv_ + j * padded_dim_, 1.0f);
    }
  }

  // Queries [q, q + rows) against keys [key, key + n).
  void tile(const Sequence& s, const KeyLimit& limit, int64_t head, int64_t q, int64_t rows,
            int64_t key, int64_t n) {
    for (int64_t i = 0; i < rows; i += D::kTileRows) {
      const int64_t count = std::min<int64_t>(D::kTileRows, rows - i);
      float *p = p_tile_ + i * kTileLd, *ds = ds_tile_ + i * kTileLd;
      const int64_t at = (q + i) * depth_;
      const int64_t panel = panel_size<D>(dim_);
      multiply_strip<D>(count, n, depth_, {query_rows_ + at, depth_, 1}, key_panels_, panel, p,
                        kTileLd, false);
      multiply_strip<D>(count, n, depth_, {grad_rows_ + at, depth_, 1}, value_panels_, panel, ds,
                        kTileLd, false);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row_index = q + i + r;
        const int64_t all = limit.of_row(row_index);
        const int64_t seen = std::clamp<int64_t>(all - key, 0, n);
        probabilities(s, head, row_index, key, seen, n, all <= kKeys, p + r * kTileLd,
                      ds + r * kTileLd, rows_ + (i + r) * kTileLd);
      }
    }
    const int64_t query_lane = q / D::kPerLane * kTileCols;
    const T* ds_rows = rows_ + kQueries * kTileLd;
    add_transposed(p_tile_, rows_, rows, n, grad_panels_ + query_lane, dv_);
    add_transposed(ds_tile_, ds_rows, rows, n, query_panels_ + query_lane, dk_);
    const Lane* a =
        kInPlace ? reinterpret_cast<const Lane*>(ds_tile_) : reinterpret_cast<const Lane*>(ds_rows);
    constexpr int64_t kLd = kTileLd / D::kPerLane;
    for (int64_t i = 0; i < rows; i += D::kTileRows) {
      multiply_strip<D>(std::min<int64_t>(D::kTileRows, rows - i), dim_, lanes<D>(n),
                        {a + i * kLd, kLd, 1}, key_natural_, panel_size<D>(n),
                        dq_ + (q + i) * padded_dim_, padded_dim_, true);
    }
  }

  // One row of the tile: scores and dO Vᵀ become drop(P) and dS, zeros past the keys that are seen.
  // `kept` gets both in the storage type, dS kQueries rows behind. `whole`: the row sees no key
  // outside of the tile. Then delta is the sum of P ∘ dP, whose rounding cancels that of dP; with
  // few keys that is the better part of it.
  void probabilities(const Sequence& s, int64_t head, int64_t i, int64_t key, int64_t seen,
                     int64_t n, bool whole, float* p, float* dp, T* kept) {
    scale_and_bias(p_, s, head, i, key, seen, p);
    const int64_t at = (s.batch * p_.heads + head) * p_.q_len + s.first_query + i;
    const Vec shift = broadcast(p_.softmax[2 * at]);
    const Quotient share(p_.softmax[2 * at + 1]);
    const Dropout& dropout = p_.dropout;
    const uint16_t* draws =
        dropout.active() ? attention_draws(p_, s, head, i, key, seen, draws_) : nullptr;
    Vec total = zero();
    for (int64_t j = 0; j < seen; j += kWidth) {
      const IVec tail = lanes_below(seen - j);
      const Vec probability = select(tail, share(power_(load(p + j) - shift)), zero());
      Vec gradient = select(tail, load(dp + j), zero());
      if (draws) gradient = drop(gradient, draws + j, dropout.threshold, dropout.scale);
      total = fma(probability, gradient, total);
      store(p + j, probability);
      store(dp + j, gradient);
    }
    const Vec delta = broadcast(whole ? sum(total) : delta_[i]);
    const Vec grad_lse = broadcast(grad_lse_[i]);
    for (int64_t j = 0; j < n; j += kWidth) {
      Vec probability = zero(), gradient = zero();
      if (j < seen) {
        probability = load(p + j);
        gradient = probability * ((load(dp + j) - delta) + grad_lse);
        if (draws) probability = drop(probability, draws + j, dropout.threshold, dropout.scale);
      }
      if constexpr (kInPlace) {
        store(p + j, probability);
        store(dp + j, gradient);
      } else {
        store(kept + j, probability);
        store(kept + kQueries * kTileLd + j, gradient);
      }
    }
  }

  FT_INLINE void store_scaled(T* dst, const float* src, float factor) const {
    for (int64_t d = 0; d < dim_; d += kWidth) store(dst + d, load(src + d) * factor, dim_ - d);
  }

  // sum (keys x D) += tileᵀ · panels, over the rows of the tile.
  void add_transposed(const float* tile, const T* kept, int64_t rows, int64_t n,
                      const Lane* panels_of_rows, float* sum) {
    const int64_t depth = lanes<D>(rows);
    if constexpr (!kInPlace) pack_columns<D>(kept, kTileLd, n, rows, columns_);
    for (int64_t j = 0; j < n; j += D::kTileRows) {
      LanesA<Lane> a;
      if constexpr (kInPlace) {
        a = {tile + j, 1, kTileLd};
      } else {
        a = packed_strip<D>(columns_, j, depth);
      }
      multiply_strip<D>(std::min<int64_t>(D::kTileRows, n - j), dim_, depth, a, panels_of_rows,
                        query_panel_, sum + j * padded_dim_, padded_dim_, true);
    }
  }

  const AttentionGradParams& g_;
  const AttentionParams& p_;
  const int64_t dim_, depth_, padded_dim_;
  const Power<D::kPerLane == 2 ? 3 : 6> power_;
  const int64_t query_space_;
  int64_t query_panel_ = 0;
  Scratch scratch_;
  MatrixUnit matrix_unit_;
  Lane *query_rows_, *grad_rows_, *query_panels_, *grad_panels_;
  Lane *key_panels_, *value_panels_, *key_natural_, *columns_;
  float *dq_, *delta_, *grad_lse_, *dk_, *dv_, *p_tile_, *ds_tile_;
  T* rows_;
  uint16_t* draws_;
};

// Keys outside [key_starts, key_lengths) belong to no sequence, and get no gradient.
template <typename T>
void clear_padding(const AttentionGradParams& g, const Sequence& s, int64_t head) {
  const AttentionParams& p = g.forward;
  if (p.cu_seqlens_k) return;
  for (int64_t j = 0; j < p.kv_len; ++j) {
    if (j >= s.first_key && j < s.first_key + s.kv_len) continue;
    store_zeros(mutable_row<T>(g.dk, s.batch, head, j), p.head_dim);
    store_zeros(mutable_row<T>(g.dv, s.batch, head, j), p.head_dim);
  }
}

template <typename T>
void differentiate(const AttentionGradParams& g, const Parallel& parallel) {
  const AttentionParams& p = g.forward;
  const Longest longest(p);
  for_units(parallel, p.batch * p.heads, [&](Units& units) {
    Worker<T> worker(g, longest);
    for (int64_t unit; units.next(unit);) {
      const int64_t head = unit % p.heads;
      const Sequence s(p, unit / p.heads);
      clear_padding<T>(g, s, head);
      worker.run(s, head);
    }
  });
}

}  // namespace

void attention_bwd(const AttentionGradParams& g, const Parallel& parallel) {
  with_storage(g.forward.dtype,
               [&](auto storage) { differentiate<decltype(storage)>(g, parallel); });
}

}  // namespace ft::FT_ISA
