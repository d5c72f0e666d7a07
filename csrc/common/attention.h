// What an attention kernel is told. Dimension letters: B batch, H heads, T query length, S key
// length, D head_dim. Row i of a sequence may attend to key j iff
//   key_starts[b] <= j < key_lengths[b],   not causal or j <= i + offset,
//   i + offset - window_left <= j <= i + offset + window_right,
// where offset is causal_offset, by default S - T. Its score is, in this order,
//   s = q_i . k_j  (+ position_query_i . position_key[z + j - i])  (+ segment_scores[i][differ])
//   s = softcap * tanh(scale * s / softcap),   or scale * s
//   s += bias[i][j] + distance_bias[z + j - i] - alibi_slope * |i + offset - j|
// with z = position_zero, and differ = whether the segments of i and j do.
#pragma once
#include "philox.h"
#include "types.h"

namespace ft {

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, q_len = 0, kv_len = 0, head_dim = 0;
  int64_t kv_heads = 0;         // divides heads: head h reads key head h / (heads / kv_heads)
  int64_t value_dim = 0;        // of value and out
  HeadsView query, key, value;  // (B, H | kv_heads, T | S, D | value_dim)
  HeadsView out;                // written by forward, read by backward
  float* lse = nullptr;         // (B, H, T), natural logarithm; -inf where a row has no key
  // (B, H, T, 2): what forward subtracts from a row's scores, and the sum of its exponentials
  // (0 where a row has no key). With them backward forms the same softmax; lse is rounded too much
  // where it is large. May be absent in forward.
  float* softmax = nullptr;

  // Packed sequences: tokens of sequence b are rows [cu_seqlens[b], cu_seqlens[b + 1]) of the one
  // "batch" that the tensors have; q_len and kv_len then count all tokens.
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* key_starts = nullptr;
  const int32_t* key_lengths = nullptr;

  HeadsView bias;  // (B, H, T, S), stride 0 where broadcast
  DType bias_dtype = DType::kFloat32;
  const float* alibi_slopes = nullptr;  // (B, H), alibi_stride 0 where broadcast over B
  int64_t alibi_stride = 0;

  // Relative positions. Row p of position_key and element p of distance_bias stand for
  // j - i = p - position_zero; positions counts them.
  int64_t position_zero = 0, positions = 0;
  const float* distance_bias = nullptr;     // (H, positions)
  HeadsView position_query;                 // (B, H, T, D)
  HeadsView position_key;                   // (1, H, positions, D)
  const float* segment_scores = nullptr;    // (B, H, T, 2)
  const int32_t* query_segments = nullptr;  // (B, T)
  const int32_t* key_segments = nullptr;    // (B, S)

  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  bool causal = false;
  bool default_offset = true;  // causal_offset is S - T of each sequence
  int64_t causal_offset = 0;
  int64_t window_left = -1, window_right = -1;  // -1: unbounded
  Dropout dropout;
};

struct AttentionGradParams {
  AttentionParams forward;
  HeadsView grad_out;               // (B, H, T, value_dim)
  const float* grad_lse = nullptr;  // (B, H, T)
  HeadsView dq, dk, dv;             // written
  // The rest is added to, and zero before; absent where it is not wanted. What sums over all rows
  // of a sequence does so in double: as one float after another it would gather too much rounding.
  HeadsView dbias;                   // float; stride 0 where bias is broadcast
  HeadsView dbias_of_rows;           // double; instead, where bias is broadcast over rows
  double* ddistance_bias = nullptr;  // (H, positions)
  float* dsegment_scores = nullptr;  // (B, H, T, 2)
  HeadsView dposition_query;         // (B, H, T, D), written
  HeadsView dposition_key;           // (1, H, positions, D), written
};

}  // namespace ft
