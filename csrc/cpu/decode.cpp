// A few query rows against the keys and values of a cache, each read once and in place: bytes are
// the cost, (D + Dv) of them for every key, head and sequence, and 2 (D + Dv) FLOPs a query row.
//
// The keys are cut in splits, and a unit of work is a split of one key/value head: all query rows
// that share the head meet it together (Flash-Decoding, Dao et al. 2023). New keys are written by
// the unit they fall into. Where a head's rows are far apart in memory the hardware does not see
// the next ones coming, so they are fetched some keys ahead.
#include "../common/decode.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "decode_scores.h"
#include "decode_splits.h"
#include "few_rows_amx.h"
#include "parallel.h"
#include "scratch.h"
#include "softmax.h"
#include "weighted_rows.h"

namespace ft::FT_ISA {
namespace {

// Keys whose values are summed up at a time: they stay in L1 while all rows of queries and all
// columns go over them, and a sum starts anew with each, which keeps its rounding error down.
constexpr int64_t kChunk = 64;
static_assert(kSplit % kChunk == 0 && kChunk % (2 * kWidth) == 0);
// How many keys ahead rows are fetched, where they do not follow one another in memory.
constexpr int64_t kAhead = 64;
// Waking another thread takes about as long as to read this.
constexpr int64_t kThreadBytes = int64_t{128} << 10;

// What the units leave behind where a sequence has several: for each slot and query row the sum of
// the weighted values, and the state of its softmax.
struct Parts {
  float* sums;           // (slots, rows, padded Dv)
  SoftmaxState* states;  // (slots, rows)
};

// Sums of values are held in whole pairs of vectors.
constexpr int64_t padded(int64_t value_dim) { return round_up(value_dim, 2 * kWidth); }

// Addresses of the rows of keys `range` of one head.
template <typename T>
void addresses(const DecodeParams& p, const HeadsView& cache, int64_t b, int64_t kv_head,
               KeySpan range, const T** to) {
  for (int64_t j = range.begin; j < range.end;) {
    const int64_t number = j / p.block_size, first = j % p.block_size;
    const int64_t block = p.block_table ? p.block_table[b * p.block_table_stride + number] : b;
    const int64_t count = std::min(range.end - j, p.block_size - first);
    const T* at = row<T>(cache, block, kv_head, first);
    for (int64_t i = 0; i < count; ++i) to[i] = at + i * cache.stride[2];
    to += count;
    j += count;
  }
}

// kLocality: 3 is L1, 2 is L2.
template <int kLocality, typename T>
void fetch(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, 0, kLocality);
}

// A row of the result from the sum of its weighted values.
template <typename T>
void finish_row(const DecodeParams& p, int64_t b, int64_t head, int64_t i, const float* sum,
                const SoftmaxState& state, double factor) {
  T* out = mutable_row<T>(p.out, b, head, i);
  const Quotient share(state.total);
  for (int64_t d = 0; d < p.value_dim; d += kWidth) {
    const Vec x = state.total == 0.0f ? zero() : share.of_any(load(sum + d));
    store(out + d, x, p.value_dim - d);
  }
  p.lse[(b * p.heads + head) * p.q_len + i] = state.logsumexp(factor);
}

// What one worker needs: the addresses of a split's rows, the scores and probabilities of all rows.
template <typename T>
class Worker {
  using D = Dot<T>;
  using Lane = typename D::Lane;
  static constexpr bool kInPlace = D::kPerLane == 1;  // probabilities are lanes as they stand
  using Probability = Operand<T>;

 public:
  Worker(const DecodeParams& p, const Splits& splits, const Parts& parts)
      : p_(p),
        splits_(splits),
        parts_(parts),
        group_(p.heads / p.kv_heads),
        rows_(group_ * p.q_len),
        depth_(lanes<D>(p.head_dim)),
        padded_dim_(padded(p.value_dim)),
        scattered_(p.key_cache.stride[2] != p.head_dim),
        in_unit_(D::kInMatrixUnit && rows_ >= kUnitFewest),
        scores_(p),
        power_(scores_.factor()),
        scratch_(ScratchSize::of([&](auto& size) { take_all(size); })) {
    take_all(scratch_);
    std::fill_n(no_row_, std::max(p.head_dim, p.value_dim), T{});
  }

  void run(int64_t number) {
    const Splits::Unit unit = splits_.unit(number);
    const int64_t keys = splits_.keys(unit.batch);
    const KeySpan split = KeySpan{unit.split * kSplit, (unit.split + 1) * kSplit};
    if (p_.new_len > 0) append(unit, split.within({p_.lengths[unit.batch], keys}));
    // whole vectors of keys: which keys share a lane must not depend on what is seen
    KeySpan range = seen_by_any(p_, keys).within(split);
    range.begin = range.begin / kWidth * kWidth;
    if (rows_ == 0) return;
    const bool alone = splits_.count(unit.batch) == 1;
    float* sums = alone ? sums_ : parts_.sums + unit.slot * rows_ * padded_dim_;
    SoftmaxState* states = alone ? states_ : parts_.states + unit.slot * rows_;
    std::fill_n(states, rows_, SoftmaxState{});
    if (range.size() > 0) attend(unit, keys, range, sums, states);
    if (!alone) return;
    for (int64_t r = 0; r < rows_; ++r) {
      finish_row<T>(p_, unit.batch, head_of(unit, r), r % p_.q_len, sums + r * padded_dim_,
                    states[r], scores_.factor());
    }
  }

 private:
  template <typename From>
  void take_all(From& from) {
    queries_ = from.template take<Lane>(rows_ * depth_);
    products_ = from.template take<float>(rows_ * kRowLength);
    probabilities_ = from.template take<Lane>(kInPlace ? 0 : round_up(rows_, kWidth) * kLanes);
    sums_ = from.template take<float>(rows_ * padded_dim_);
    states_ = from.template take<SoftmaxState>(rows_);
    keys_ = from.template take<const T*>(kRowLength);
    values_ = from.template take<const T*>(kRowLength);
    if constexpr (D::kInMatrixUnit) {
      unit_queries_ = from.template take<Lane>(unit_rows(rows_, p_.head_dim));
      unit_keys_ = from.template take<T>(unit_copies(p_.head_dim));
    }
    no_row_ = from.template take<T>(std::max(p_.head_dim, p_.value_dim));
  }

  int64_t head_of(const Splits::Unit& unit, int64_t r) const {
    return unit.kv_head * group_ + r / p_.q_len;
  }

  // Writes the new keys `range` and their values where they belong.
  void append(const Splits::Unit& unit, KeySpan range) {
    if (range.size() == 0) return;
    append(unit, range, p_.new_key, p_.key_cache, p_.head_dim, keys_);
    append(unit, range, p_.new_value, p_.value_cache, p_.value_dim, values_);
  }
  void append(const Splits::Unit& unit, KeySpan range, const HeadsView& from,
              const HeadsView& cache, int64_t dim, const T** to) {
    addresses(p_, cache, unit.batch, unit.kv_head, range, to);
    for (int64_t i = 0; i < range.size(); ++i) {
      const int64_t number = range.begin + i - p_.lengths[unit.batch];
      std::memcpy(const_cast<T*>(to[i]), row<T>(from, unit.batch, unit.kv_head, number),
                  dim * sizeof(T));
    }
  }

  void attend(const Splits::Unit& unit, int64_t keys, KeySpan range, float* sums,
              SoftmaxState* states) {
    const int64_t count = range.size();
    // rows that make whole vectors of what the last key leaves: zeros, which are no one's
    std::fill_n(keys_ + count, kSlack, no_row_);
    std::fill_n(values_ + count, kSlack, no_row_);
    addresses(p_, p_.key_cache, unit.batch, unit.kv_head, range, keys_);
    addresses(p_, p_.value_cache, unit.batch, unit.kv_head, range, values_);
    for (int64_t g = 0; g < group_; ++g) {
      pack_rows<D>(row<T>(p_.query, unit.batch, unit.kv_head * group_ + g, 0), p_.query.stride[2],
                   p_.q_len, p_.head_dim, queries_ + g * p_.q_len * depth_, depth_);
    }
    multiply(count);
    for (int64_t r = 0; r < rows_; ++r) softmax(unit, keys, range, r, states[r]);
    weigh(count, sums);
  }

  // With row `done` of the keys, and then of the values, of which `n` are about to be read: fetches
  // what comes after. Scattered rows need all of them fetched, kAhead rows before. Of rows that
  // follow one another the hardware fetches the next; it does so for one stream of rows faster
  // where the other is on its way: values while keys are read, then the keys of the next split.
  void fetch_ahead(int64_t done, int64_t n, int64_t count) const {
    if (scattered_) {
      const int64_t begin = done + kAhead, end = begin + n;
      for (int64_t i = begin; i < std::min(end, count); ++i) fetch<3>(keys_[i], p_.head_dim);
      for (int64_t i = std::max(begin, count); i < std::min(end, 2 * count); ++i) {
        fetch<3>(values_[i - count], p_.value_dim);
      }
      return;
    }
    for (int64_t i = done; i < std::min(done + n, count); ++i) fetch<2>(values_[i], p_.value_dim);
    for (int64_t i = std::max(done, count); i < std::min(done + n, 2 * count); ++i) {
      fetch<2>(keys_[i - count] + count * p_.head_dim, p_.head_dim);
    }
  }

  // products_[r][j] = query row r · key j
  void multiply(int64_t count) {
    if (in_unit_) {
      if constexpr (D::kInMatrixUnit) {
        pack_rows_amx(queries_, depth_, rows_, depth_, unit_queries_);
        dot_rows_amx(unit_queries_, rows_, p_.head_dim, keys_, count, unit_keys_, products_,
                     kRowLength);
      }
      return;
    }
    for (int64_t j = 0; j < count; j += kWidth) {
      fetch_ahead(j, kWidth, count);
      for_row_blocks(rows_, [&]<int kRows>(std::integral_constant<int, kRows>, int64_t r) {
        constexpr int kKeys = kWidth / kRows;
        for (int64_t k = j; k < j + kWidth; k += kKeys) {
          dot_tile<D, T, kRows>(queries_ + r * depth_, depth_, keys_ + k, 0, p_.head_dim,
                                products_ + r * kRowLength + k, kRowLength, false);
        }
      });
    }
  }

  // The products of row r become probabilities, zero where it does not see the key.
  void softmax(const Splits::Unit& unit, int64_t keys, KeySpan range, int64_t r,
               SoftmaxState& state) {
    const int64_t i = r % p_.q_len, end = round_up(range.size(), kSlack);
    const KeySpan seen = seen_by_row(p_, keys, i).within(range);
    const int64_t first = seen.size() ? seen.begin - range.begin : 0, count = seen.size();
    float* products = products_ + r * kRowLength;
    auto* p = reinterpret_cast<Probability*>(kInPlace ? reinterpret_cast<Lane*>(products)
                                                      : probabilities_ + r * kLanes);
    if (count > 0) {
      scores_.apply(unit.batch, head_of(unit, r), i, keys, seen, products + first);
      state.meet(fold(largest(products + first, count), [](Vec a, Vec b) { return max(a, b); }),
                 scores_.factor());
      state.total = sum(exponentials(products + first, count, state.shift(), power_, p + first));
    }
    std::fill(p, p + first, Probability{});
    std::fill(p + first + count, p + end, Probability{});
  }
  template <typename Op>
  static float fold(Vec v, const Op& op) {
    float of_row[kWidth];
    fold_rows(&v, 1, of_row, op);
    return of_row[0];
  }

  void weigh(int64_t count, float* sums) {
    if (in_unit_) {
      if constexpr (D::kInMatrixUnit) {
        weigh_rows_amx(probabilities_, kLanes, rows_, round_up(count, kUnitPair), values_,
                       p_.value_dim, sums, padded_dim_);
      }
      return;
    }
    const Lane* p = kInPlace ? reinterpret_cast<const Lane*>(products_) : probabilities_;
    for (int64_t j = 0; j < count; j += kChunk) {
      fetch_ahead(count + j, kChunk, count);
      weigh_rows<D, T>(p + j / D::kPerLane, kLanes, rows_, lanes<D>(std::min(kChunk, count - j)),
                       values_ + j, p_.value_dim, sums, padded_dim_, j > 0);
    }
  }

  static constexpr int64_t kSlack = 2 * kWidth;  // keys that fill up vectors, pairs of vectors
  static constexpr int64_t kRowLength = kSplit + kSlack;
  static constexpr int64_t kLanes = kRowLength / D::kPerLane;

  const DecodeParams& p_;
  const Splits& splits_;
  const Parts& parts_;
  const int64_t group_, rows_, depth_, padded_dim_;
  const bool scattered_, in_unit_;
  const DecodeScores scores_;
  const Power<kPowerDegree<D>> power_;
  Scratch scratch_;
  Lane *queries_, *probabilities_;
  float *products_, *sums_;
  SoftmaxState* states_;
  const T **keys_, **values_;
  T* no_row_;
  const FewRowsUnit unit_{in_unit_};
  Lane* unit_queries_ = nullptr;
  T* unit_keys_ = nullptr;
};

// Puts the parts of each row together, in the order of their keys.
template <typename T>
void merge(const DecodeParams& p, const Splits& splits, const Parts& parts, int64_t b,
           int64_t kv_head) {
  const int64_t group = p.heads / p.kv_heads, rows = group * p.q_len;
  const int64_t padded_dim = padded(p.value_dim);
  const double factor = DecodeScores(p).factor();
  const int64_t first = splits.slot(b, kv_head), end = first + splits.count(b);
  for (int64_t r = 0; r < rows; ++r) {
    SoftmaxState whole;
    float* sum = nullptr;
    for (int64_t slot = first; slot < end; ++slot) {
      const SoftmaxState& part = parts.states[slot * rows + r];
      if (part.total == 0.0f) continue;
      float* of_part = parts.sums + (slot * rows + r) * padded_dim;
      const float kept = whole.meet(part.maximum, factor);
      const auto weight =
          static_cast<float>(std::exp2((double{part.maximum} - whole.maximum) * factor));
      whole.total += part.total * weight;
      if (!sum) {
        sum = of_part;
        continue;
      }
      for (int64_t d = 0; d < padded_dim; d += kWidth) {
        store(sum + d, fma(load(of_part + d), broadcast(weight), load(sum + d) * kept));
      }
    }
    finish_row<T>(p, b, kv_head * group + r / p.q_len, r % p.q_len, sum, whole, factor);
  }
}

template <typename T>
void decode(const DecodeParams& p, const Parallel& parallel) {
  const int64_t rows = p.heads / p.kv_heads * p.q_len;
  Scratch numbers(Scratch::bytes<int64_t>(p.batch + 1));
  const Splits splits(p, numbers.take<int64_t>(p.batch + 1));
  int64_t most = 0, bytes = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    most = std::max(most, splits.count(b));
    bytes += splits.keys(b) * (p.head_dim + p.value_dim) * p.kv_heads * sizeof(T);
  }
  const int64_t slots = most > 1 ? splits.units() : 0;
  Parts parts;
  const auto take_all = [&](auto& from) {
    parts.sums = from.template take<float>(slots * rows * padded(p.value_dim));
    parts.states = from.template take<SoftmaxState>(slots * rows);
  };
  Scratch scratch(ScratchSize::of(take_all));
  take_all(scratch);

  const Parallel few{std::clamp<int64_t>(bytes / kThreadBytes, 1, parallel.threads), parallel.run};
  for_units(few, splits.units(), [&](Units& units) {
    Worker<T> worker(p, splits, parts);
    for (int64_t unit; units.next(unit);) worker.run(unit);
  });
  if (slots == 0) return;
  for_units(few, p.batch * p.kv_heads, [&](Units& units) {
    for (int64_t unit; units.next(unit);) {
      const int64_t b = unit / p.kv_heads;
      if (splits.count(b) > 1) merge<T>(p, splits, parts, b, unit % p.kv_heads);
    }
  });
}

}  // namespace

void attention_decode(const DecodeParams& p, const Parallel& parallel) {
  if (p.batch == 0 || p.kv_heads == 0) return;
  with_storage(p.dtype, [&](auto storage) { decode<decltype(storage)>(p, parallel); });
}

}  // namespace ft::FT_ISA
