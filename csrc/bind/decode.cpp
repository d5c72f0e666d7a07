// attention_decode: tensors in, params struct out. Its schema is in library.cpp.
#include "../common/decode.h"

#include <algorithm>

#include "tensor.h"

namespace ft::bind {
namespace {

constexpr auto kOp = "attention_decode";

// Lengths and block numbers are read by the kernel as addresses.
const int32_t* integers(const char* name, const Tensor& t, int64_t dims, int64_t batch) {
  STD_TORCH_CHECK(
      t.dim() == dims && t.size(0) == batch && scalar_type(t) == aoti_torch_dtype_int32(), kOp,
      ": ", name, " must be an int32 tensor of ", batch, " sequences");
  STD_TORCH_CHECK(t.stride(dims - 1) == 1 || t.size(dims - 1) <= 1, kOp, ": ", name,
                  " must be contiguous in its last dimension");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor> attention_decode(Tensor query, Tensor key_cache, Tensor value_cache,
                                            Tensor cache_lengths, OptionalTensor new_key,
                                            OptionalTensor new_value, OptionalTensor block_table,
                                            OptionalTensor alibi_slopes, double scale, bool causal,
                                            int64_t window_left, int64_t window_right,
                                            double softcap) {
  DecodeParams p;
  STD_TORCH_CHECK(query.dim() == 4 && key_cache.dim() == 4 && value_cache.dim() == 4, kOp,
                  ": query and caches must be (batch, heads, length, head_dim)");
  p.dtype = dtype(query);
  STD_TORCH_CHECK(p.dtype != DType::kBool, kOp, ": query must be a floating tensor");
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.kv_heads = key_cache.size(1);
  p.q_len = query.size(2);
  p.head_dim = query.size(3);
  p.value_dim = value_cache.size(3);
  p.block_size = key_cache.size(2);
  STD_TORCH_CHECK(p.head_dim >= 1, kOp, ": head_dim must be at least 1");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, kOp, ": ", p.kv_heads,
                  " heads of the caches must divide ", p.heads, " heads of query");
  const int64_t blocks = key_cache.size(0);
  STD_TORCH_CHECK(block_table || blocks == p.batch, kOp, ": key_cache must have ", p.batch,
                  " sequences");
  p.query = heads_view(query);
  p.key_cache =
      heads_view(kOp, "key_cache", key_cache, blocks, p.kv_heads, p.block_size, p.head_dim, query);
  p.value_cache = heads_view(kOp, "value_cache", value_cache, blocks, p.kv_heads, p.block_size,
                             p.value_dim, query);
  STD_TORCH_CHECK(new_key.has_value() == new_value.has_value(), kOp,
                  ": new_key and new_value come together");
  if (new_key) {
    p.new_len = new_key->dim() == 4 ? new_key->size(2) : 0;
    p.new_key =
        heads_view(kOp, "new_key", *new_key, p.batch, p.kv_heads, p.new_len, p.head_dim, query);
    p.new_value = heads_view(kOp, "new_value", *new_value, p.batch, p.kv_heads, p.new_len,
                             p.value_dim, query);
  }

  int64_t room = p.block_size;
  if (block_table) {
    p.block_table = integers("block_table", *block_table, 2, p.batch);
    p.block_table_stride = block_table->stride(0);
    room = p.block_size * block_table->size(1);
  }
  p.lengths = integers("cache_lengths", cache_lengths, 1, p.batch);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.lengths[b];
    STD_TORCH_CHECK(length >= 0 && length <= room - p.new_len, kOp, ": cache_lengths[", b, "] is ",
                    length, "; it must lie in [0, ", room - p.new_len, "]");
    if (!p.block_table) continue;
    const int32_t* table = p.block_table + b * p.block_table_stride;
    for (int64_t i = 0; i * p.block_size < length + p.new_len; ++i) {
      STD_TORCH_CHECK(table[i] >= 0 && table[i] < blocks, kOp, ": block_table[", b, ", ", i,
                      "] is ", table[i], "; it must lie in [0, ", blocks - 1, "]");
    }
  }

  set_alibi(kOp, p, alibi_slopes);
  p.scale = scale;
  p.causal = causal;
  p.window_left = window_left;
  p.window_right = window_right;
  p.softcap = softcap;

  Tensor out = empty({p.batch, p.heads, p.q_len, p.value_dim}, scalar_type(query), {0, 2, 1, 3});
  Tensor lse = empty({p.batch, p.heads, p.q_len}, aoti_torch_dtype_float32());
  p.out = heads_view(out);
  p.lse = mutable_data<float>(lse);
  kernels().attention_decode(p, torch_threads());
  return {out, lse};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&ft::bind::attention_decode));
}
