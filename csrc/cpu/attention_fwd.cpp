// out = softmax(scores) V without the (T x S) matrix: FlashAttention (Dao et al. 2022) on the CPU.
// A strip of D::kTileRows query rows meets a block of keys at a time; its scores live in L1, K and
// V of the block, packed once per key head, in L2. Cost of one head: 4 T S D FLOPs (causal: half),
// T S exponentials, reads (T + 2 S) D elements and writes T D; memory O((T + S) D).
#include "attention_strips.h"

namespace ft::FT_ISA {
namespace {

template <typename T>
class Worker {
  using D = Dot<T>;

 public:
  Worker(const AttentionParams& p, const Longest& longest)
      : p_(p),
        group_(p.heads / p.kv_heads),
        block_(p),
        may_be_bounded_(block_.scores.plain() && !p.dropout.active()),
        scratch_(ScratchSize::of([&](auto& size) { block_.take_all(size, longest); })) {
    block_.take_all(scratch_, longest);
  }

  // Rows [begin, end) of blocks of queries of one head.
  void run(const Sequence& s, int64_t head, int64_t begin_block, int64_t end_block) {
    const int64_t queries = block_.blocks.queries, keys = block_.blocks.keys;
    const int64_t begin = begin_block * queries, end = std::min(s.q_len, end_block * queries);
    if (begin >= end) return;
    const KeyRange range(p_, s);
    pack_keys(s, head / group_, range.begin(begin) / keys * keys, range.end(end - 1));
    block_.positions.pack_keys(p_, s, head, begin, end, packed_.begin, packed_.end);
    for (int64_t q = begin; q < end; q += queries) {
      rows(s, range, head, q, std::min(queries, end - q));
    }
  }

 private:
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
    block_.first_key = packed_.begin;
    block_.value_panel = panel_size<D>(keys);
    pack_transposed<D>(row<T>(p_.key, s.batch, head, first), p_.key.stride[2], keys, p_.head_dim,
                       block_.keys);
    // whole lanes, if the sequence has them: what is in a lane must not depend on where pieces end
    pack_natural<D>(row<T>(p_.value, s.batch, head, first), p_.value.stride[2], p_.value_dim,
                    std::min(s.kv_len - packed_.begin, round_up(keys, D::kPerLane)), block_.values);
    // of all keys, so that it does not depend on pieces either
    if (may_be_bounded_) {
      key_norm_ = largest_norm(p_.key, p_.head_dim, s.batch, head, s.first_key, s.kv_len);
      value_size_ = largest_value(s, head);
    }
  }
  // At least the largest norm of the rows; NaN or infinite where one of them is.
  static float largest_norm(const HeadsView& v, int64_t dim, int64_t batch, int64_t head,
                            int64_t begin, int64_t count) {
    float most = 0.0f;
    for (int64_t i = begin; i < begin + count; ++i) {
      const T* x = row<T>(v, batch, head, i);
      Vec total = zero();
      for (int64_t d = 0; d < dim; d += kWidth) {
        const Vec part = load(x + d, dim - d);
        total = fma(part, part, total);
      }
      const float square = sum(total);
      if (square > most || square != square) most = square;  // a NaN stays
    }
    constexpr float kVanished = 0x1p-62f;  // what has a square that is 0 is smaller
    return std::sqrt(most) + kVanished * std::sqrt(static_cast<float>(dim));
  }
  // The largest of a head's values, NaN where one of them is: as integers the magnitudes of floats
  // are in the order of their size, with infinity and then NaN behind all others.
  float largest_value(const Sequence& s, int64_t head) const {
    IVec most[2] = {};
    for (int64_t j = 0; j < s.kv_len; ++j) {
      const T* v = row<T>(p_.value, s.batch, head, s.first_key + j);
      for (int64_t d = 0; d < p_.value_dim; d += kWidth) {
        const IVec x = as<IVec>(abs(load(v + d, p_.value_dim - d)));
        IVec& top = most[d / kWidth % 2];
        top = x > top ? x : top;
      }
    }
    int32_t largest = 0;
    for (const IVec& top : most) {
      for (int i = 0; i < kWidth; ++i) largest = std::max<int32_t>(largest, top[i]);
    }
    float value;
    std::memcpy(&value, &largest, sizeof(value));
    return value;
  }
  // Whether no score of these rows is large, by Cauchy and Schwarz: |q . k| <= |q| |k|.
  bool bounded(const Sequence& s, int64_t head, int64_t q, int64_t count) const {
    if (!may_be_bounded_ || !(value_size_ >= kLeastValue && value_size_ <= kMostValue))
      return false;
    const float norm = largest_norm(p_.query, p_.head_dim, s.batch, head, s.first_query + q, count);
    constexpr double kRounding = 1.001;
    return norm * kRounding * key_norm_ * block_.factor < kBound;
  }

  // With each strip, rows of its number are fetched: of the output, and of the head that follows.
  void fetch(const Sequence& s, int64_t head, int64_t begin, int64_t count) const {
    fetch_rows<T>(p_.out, p_.value_dim, s.batch, head, s.first_query + begin, count);
    if (head + 1 < p_.heads) fetch_inputs<T>(p_, s, head + 1, begin, count);
  }

  void rows(const Sequence& s, const KeyRange& range, int64_t head, int64_t q, int64_t count) {
    const T* query = row<T>(p_.query, s.batch, head, s.first_query + q);
    pack_rows<D>(query, p_.query.stride[2], count, p_.head_dim, block_.queries, block_.depth);
    block_.positions.pack_queries(p_, s, head, q, count);
    const bool bounded = this->bounded(s, head, q, count);
    if (bounded) {
      std::fill_n(block_.totals, count, zero());
      attend(BoundedStrips<T>(block_, s, range, head, q), s, range, head, q, count);
      for (int64_t i = 0; i < count; ++i) block_.states[i] = {-INFINITY, sum(block_.totals[i])};
    } else {
      std::fill_n(block_.states, count, SoftmaxState{});
      attend(OnlineStrips<T>(block_, s, range, head, q), s, range, head, q, count);
    }
    for (int64_t i = 0; i < count; ++i) {
      finish_row(mutable_row<T>(p_.out, s.batch, head, s.first_query + q + i), i);
      SoftmaxState state = block_.states[i];
      if (bounded && state.total > 0.0f) state = {0.0f, state.total / kBoundedScale};
      const int64_t at = (s.batch * p_.heads + head) * p_.q_len + s.first_query + q + i;
      p_.lse[at] = state.logsumexp(block_.factor);
      if (p_.softmax) {
        p_.softmax[2 * at] = state.shift();
        p_.softmax[2 * at + 1] = state.total;
      }
    }
  }
  template <typename Strips>
  void attend(Strips strips, const Sequence& s, const KeyRange& range, int64_t head, int64_t q,
              int64_t rows) {
    const int64_t keys = range.end(q + rows - 1), step = block_.blocks.keys;
    int64_t fetched = 0;
    for (int64_t key = range.begin(q) / step * step; key < keys; key += step) {
      for (int64_t i = 0; i < rows; i += D::kTileRows) {
        const int64_t count = std::min<int64_t>(D::kTileRows, rows - i);
        const int64_t n = std::min(step, range.end(q + i + count - 1) - key);
        const int64_t begin = range.begin(q + i);
        if (fetched < rows) fetch(s, head, q + i, count);
        fetched += count;
        if (n > 0 && begin < key + n) strips.meet({i, count, key, n, begin >= key});
      }
    }
  }

  // The gathered output of row i of the block over the sum of its exponentials.
  void finish_row(T* out, int64_t i) {
    if (block_.states[i].total == 0.0f) return store_zeros(out, p_.value_dim);
    const Quotient share(block_.states[i].total);
    const float kept = p_.dropout.active() ? p_.dropout.scale : 1.0f;
    const float* from = block_.out + i * block_.padded_dim;
    for (int64_t d = 0; d < p_.value_dim; d += kWidth) {
      store(out + d, share.of_any(load(from + d)) * kept, p_.value_dim - d);
    }
  }

  const AttentionParams& p_;
  const int64_t group_;
  ForwardBlock<T> block_;
  const bool may_be_bounded_;
  Packed packed_;
  float key_norm_ = 0.0f, value_size_ = 0.0f;
  Scratch scratch_;
  MatrixUnit matrix_unit_;
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
