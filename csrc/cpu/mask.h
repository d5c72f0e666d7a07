// Which keys a query row may attend to.
//
// Keys that the sequence does not have (key_starts, key_lengths, packing) are gone before a kernel
// starts: `Sequence` moves the base addresses, so they are never read. What causality and the
// window leave for a row is one range of keys, which `KeyRange` gives. A boolean bias, which may
// forbid any pair, is -inf added to a score (scores.h).
#pragma once
#include <algorithm>

#include "../common/attention.h"

namespace ft::FT_ISA {

// One sequence of the batch: where its rows lie and how its diagonal runs. Keys are counted from
// the first one that may be attended to.
struct Sequence {
  int64_t index;        // in the batch: of dropout and bias
  int64_t batch;        // of the tensors: 0 for packed sequences
  int64_t first_query;  // row of the tensors
  int64_t first_key;    // row of the tensors
  int64_t column;       // position of the first key in its sequence: of dropout and bias
  int64_t q_len, kv_len;
  int64_t diagonal;  // of row i is key i + diagonal

  Sequence(const AttentionParams& p, int64_t b) : index(b) {
    if (p.cu_seqlens_q) {
      batch = 0;
      first_query = p.cu_seqlens_q[b];
      q_len = p.cu_seqlens_q[b + 1] - first_query;
      first_key = p.cu_seqlens_k[b];
      kv_len = p.cu_seqlens_k[b + 1] - first_key;
    } else {
      batch = b;
      first_query = first_key = 0;
      q_len = p.q_len;
      kv_len = p.kv_len;
    }
    const int64_t offset = p.default_offset ? kv_len - q_len : p.causal_offset;
    if (p.key_lengths) kv_len = p.key_lengths[b];
    column = p.key_starts ? p.key_starts[b] : 0;
    first_key += column;
    kv_len = kv_len > column ? kv_len - column : 0;
    diagonal = offset - column;
  }
};

// The keys that row i sees are [begin(i), end(i)), if any. Neither falls as i grows, which the
// block loops use.
class KeyRange {
 public:
  KeyRange(const AttentionParams& p, const Sequence& s)
      : keys_(s.kv_len),
        left_(s.diagonal - (p.window_left < 0 ? kUnbounded : p.window_left)),
        right_(s.diagonal + (p.causal             ? 0
                             : p.window_right < 0 ? kUnbounded
                                                  : p.window_right)) {}

  int64_t begin(int64_t i) const { return clamp(i + left_); }
  int64_t end(int64_t i) const { return clamp(i + right_ + 1); }
  // The first row that sees key j or one behind it, and the first row behind all that see key j or
  // one before it.
  int64_t first_row(int64_t j) const { return std::max<int64_t>(0, j - right_); }
  int64_t end_row(int64_t j) const { return std::max<int64_t>(0, j - left_ + 1); }

 private:
  static constexpr int64_t kUnbounded = int64_t{1} << 40;
  int64_t clamp(int64_t j) const { return j < 0 ? 0 : j < keys_ ? j : keys_; }
  const int64_t keys_, left_, right_;
};

}  // namespace ft::FT_ISA
