// Which keys a query row may attend to, and what is added to its scores.
//
// Keys that the sequence does not have (key_starts, key_lengths, packing) are gone before a kernel
// starts: `Sequence` moves the base addresses, so they are never read. What is left for a row is
// one range of keys, which `KeyLimit` gives, and the bias.
#pragma once
#include "../common/attention.h"
#include "pack.h"

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
  int64_t diagonal;  // causal: row i sees keys j <= i + diagonal

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

// The keys that row i sees are [0, of_row(i)). It never falls as i grows, which the block loops
// use.
struct KeyLimit {
  bool causal;
  int64_t keys, diagonal;

  KeyLimit(const AttentionParams& p, const Sequence& s)
      : causal(p.causal), keys(s.kv_len), diagonal(s.diagonal) {}

  int64_t of_row(int64_t i) const {
    if (!causal) return keys;
    const int64_t end = i + diagonal + 1;
    return end < 0 ? 0 : end < keys ? end : keys;
  }
  // The first row that sees key j.
  int64_t first_row(int64_t j) const {
    const int64_t row = causal ? j - diagonal : 0;
    return row < 0 ? 0 : row;
  }
};

// kWidth elements of a bias row; -inf where a boolean forbids.
template <typename T>
FT_INLINE Vec load_bias(const T* p, int64_t left) {
  return load(p, left);
}
FT_INLINE Vec load_bias(const bool* p, int64_t left) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes{};
  std::memcpy(&bytes, p, left < kWidth ? left : kWidth);
  const UVec allowed = __builtin_convertvector(bytes, UVec);
  return select(as<IVec>(allowed != 0u), zero(), broadcast(-INFINITY));
}

// scores[j] = scores[j] * scale + bias[j], for j < n.
template <typename T>
void add_bias(float* scores, const T* bias, int64_t n, float scale) {
  for (int64_t j = 0; j < n; j += kWidth) {
    store(scores + j, fma(load(scores + j), broadcast(scale), load_bias(bias + j, n - j)));
  }
}

// Whether scores are scaled before the softmax: for a bias to be added, or since only a positive
// factor may be left, so that the maximum can be taken first.
FT_INLINE bool scaled_before(const AttentionParams& p) { return p.bias || p.scale < 0.0; }

// What softmax multiplies the scores by that `scale_and_bias` leaves: it takes powers of 2.
FT_INLINE double softmax_factor(const AttentionParams& p) {
  constexpr double kLog2E = 1.44269504088896340736;
  return scaled_before(p) ? kLog2E : p.scale * kLog2E;
}

// Turns the first n products of row i (keys from `key` on) into scores, but for `softmax_factor`.
FT_INLINE void scale_and_bias(const AttentionParams& p, const Sequence& s, int64_t head, int64_t i,
                              int64_t key, int64_t n, float* scores) {
  if (!scaled_before(p)) return;
  const auto scale = static_cast<float>(p.scale);
  if (!p.bias) {
    for (int64_t j = 0; j < n; j += kWidth) store(scores + j, load(scores + j) * scale);
    return;
  }
  const int64_t column = s.column + key;
  switch (p.bias_dtype) {
    case DType::kFloat32:
      add_bias(scores, row<float>(p.bias, s.index, head, i) + column, n, scale);
      break;
    case DType::kBFloat16:
      add_bias(scores, row<bf16>(p.bias, s.index, head, i) + column, n, scale);
      break;
    case DType::kFloat16:
      add_bias(scores, row<fp16>(p.bias, s.index, head, i) + column, n, scale);
      break;
    case DType::kBool:
      add_bias(scores, row<bool>(p.bias, s.index, head, i) + column, n, scale);
      break;
  }
}

}  // namespace ft::FT_ISA
