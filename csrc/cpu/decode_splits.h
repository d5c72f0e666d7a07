// How the keys of a cache are cut into units of work (Flash-Decoding, Dao et al. 2023).
#pragma once
#include <algorithm>

#include "decode_scores.h"
#include "parallel.h"

namespace ft::FT_ISA {

// Keys of a split. It depends on nothing, so a sequence is cut the same way in every batch. What a
// split leaves behind is a row of Dv floats for each query row: 1/512 of what it has read.
constexpr int64_t kSplit = 512;

// The splits of all sequences, in a row: those of sequence b are numbers [first[b], first[b + 1])
// times the key/value heads.
class Splits {
 public:
  Splits(const DecodeParams& p, int64_t* first) : p_(p), first_(first) {
    first_[0] = 0;
    // the order in which memory has them: rows of neighbouring heads, or of neighbouring keys
    heads_first_ = p.key_cache.stride[1] < p.key_cache.stride[2];
    for (int64_t b = 0; b < p.batch; ++b) {
      const KeySpan range = touched(b);
      const int64_t count = ceil_div(range.end, kSplit) - range.begin / kSplit;
      first_[b + 1] = first_[b] + std::max<int64_t>(1, count);
    }
  }

  struct Unit {
    int64_t batch, kv_head, split;  // split: of the sequence, counted from its first key
    int64_t slot;                   // where its part of the result belongs
  };
  Unit unit(int64_t number) const {
    const int64_t* end = std::upper_bound(first_, first_ + p_.batch + 1, number / p_.kv_heads);
    const int64_t b = end - first_ - 1, splits = count(b);
    const int64_t within = number - first_[b] * p_.kv_heads;
    const int64_t head = heads_first_ ? within % p_.kv_heads : within / splits;
    const int64_t split = heads_first_ ? within / p_.kv_heads : within % splits;
    return {b, head, touched(b).begin / kSplit + split, slot(b, head) + split};
  }
  int64_t units() const { return first_[p_.batch] * p_.kv_heads; }
  int64_t count(int64_t b) const { return first_[b + 1] - first_[b]; }
  int64_t slot(int64_t b, int64_t kv_head) const {
    return first_[b] * p_.kv_heads + kv_head * count(b);
  }
  int64_t keys(int64_t b) const { return p_.lengths[b] + p_.new_len; }

 private:
  // All keys that are read or written.
  KeySpan touched(int64_t b) const {
    KeySpan range = seen_by_any(p_, keys(b));
    if (range.size() == 0) range = {keys(b), keys(b)};
    if (p_.new_len == 0) return range;
    return {std::min<int64_t>(range.begin, p_.lengths[b]), keys(b)};
  }

  const DecodeParams& p_;
  int64_t* first_;
  bool heads_first_;
};

}  // namespace ft::FT_ISA
