// What an attention kernel is told. Dimension letters: B batch, H heads, T query length, S key
// length, D head_dim. Row i may attend to key j iff
//   key_starts[b] <= j < key_lengths[b]   and   (not causal or j <= i + causal_offset).
#pragma once
#include "philox.h"
#include "types.h"

namespace ft {

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, q_len = 0, kv_len = 0, head_dim = 0;
  HeadsView query, key, value;  // (B, H, T | S, D)
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

  double scale = 1.0;
  bool causal = false;
  bool default_offset = true;  // causal_offset is S - T of each sequence
  int64_t causal_offset = 0;
  Dropout dropout;
};

struct AttentionGradParams {
  AttentionParams forward;
  HeadsView grad_out;               // (B, H, T, D)
  const float* grad_lse = nullptr;  // (B, H, T)
  HeadsView dq, dk, dv;             // written
};

}  // namespace ft
