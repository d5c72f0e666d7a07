// What the decode kernel is told. Dimension letters as in attention.h; a sequence has
// keys = lengths[b] + new_len keys, and row i of its T rows stands at position i + keys - T.
#pragma once
#include "types.h"

namespace ft {

struct DecodeParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, head_dim = 0, value_dim = 0;
  HeadsView query;       // (B, H, T, D)
  HeadsView out;         // (B, H, T, Dv), written
  float* lse = nullptr;  // (B, H, T), natural logarithm; -inf where a row has no key

  // Key j of sequence b is row j % block_size of the block that holds it: block_table[b][j /
  // block_size], or, without a table, block b, whose size is then the whole room.
  HeadsView key_cache, value_cache;  // (blocks, KV, block_size, D | Dv), written by new keys
  int64_t block_size = 0;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  const int32_t* lengths = nullptr;  // (B,): keys in the cache before the new ones

  HeadsView new_key, new_value;  // (B, KV, new_len, D | Dv), to be put behind the others
  int64_t new_len = 0;

  double scale = 1.0;
  bool causal = true;                           // row i sees no key behind its own position
  int64_t window_left = -1, window_right = -1;  // nor one further off than this; -1: any
  double softcap = 0.0;                         // c * tanh(score / c), unless 0
  const float* alibi_slopes = nullptr;  // (B, H), or (H) with stride 0: minus slope * distance
  int64_t alibi_stride = 0;
};

}  // namespace ft
