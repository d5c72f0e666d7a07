// attention_fwd, attention_bwd: tensors in, params structs out. Their schemas are in library.cpp.
#include "../common/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "tensor.h"

namespace ft::bind {
namespace {

// What both passes take beside query, key and value.
struct Options {
  OptionalTensor bias, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed;
  OptionalTensor alibi_slopes, distance_bias, position_query, position_key;
  OptionalTensor segment_scores, query_segments, key_segments;
  double scale;
  bool causal;
  std::optional<int64_t> causal_offset;
  int64_t window_left, window_right;
  double softcap;
  int64_t position_zero;
  double dropout_p;
};

// A contiguous tensor of the given type and shape, as its address; null where there is none.
template <typename T>
const T* elements(const char* op, const char* name, const OptionalTensor& t, int32_t type,
                  std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  bool right = scalar_type(*t) == type && t->is_contiguous() &&
               t->dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; right && d < t->dim(); ++d) right = t->size(d) == shape.begin()[d];
  STD_TORCH_CHECK(right, op, ": ", name, " has the wrong shape, dtype or layout");
  return static_cast<const T*>(t->const_data_ptr());
}

// Positions are read by the kernel as addresses: a second line of defence behind Python's checks.
const int32_t* positions(const char* op, const char* name, const OptionalTensor& t, int64_t count,
                         int64_t most) {
  const auto* values = elements<int32_t>(op, name, t, aoti_torch_dtype_int32(), {count});
  for (int64_t i = 0; values && i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] <= most, op, ": ", name, "[", i, "] is ", values[i],
                    "; it must lie in [0, ", most, "]");
  }
  return values;
}
const int32_t* offsets(const char* op, const char* name, const OptionalTensor& t, int64_t tokens) {
  const int64_t count = t->dim() == 1 ? t->size(0) : 0;
  const int32_t* values = positions(op, name, t, count, tokens);
  STD_TORCH_CHECK(count >= 1 && values[0] == 0 && values[count - 1] == tokens, op, ": ", name,
                  " must run from 0 to ", tokens);
  for (int64_t i = 1; i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= values[i - 1], op, ": ", name, " must not fall");
  }
  return values;
}

// The longest sequences of the batch.
struct Longest {
  int64_t queries, keys;
};

Longest sequences(const char* op, AttentionParams& p, const Options& options) {
  Longest longest{p.q_len, p.kv_len};
  if (options.cu_seqlens_q || options.cu_seqlens_k) {
    STD_TORCH_CHECK(p.batch == 1 && options.cu_seqlens_q && options.cu_seqlens_k &&
                        !options.key_starts && !options.key_lengths && !options.segment_scores,
                    op, ": packed sequences are one batch, without key_starts or key_lengths");
    p.cu_seqlens_q = offsets(op, "cu_seqlens_q", options.cu_seqlens_q, p.q_len);
    p.cu_seqlens_k = offsets(op, "cu_seqlens_k", options.cu_seqlens_k, p.kv_len);
    p.batch = options.cu_seqlens_q->size(0) - 1;
    STD_TORCH_CHECK(options.cu_seqlens_k->size(0) == p.batch + 1, op,
                    ": cu_seqlens_q and cu_seqlens_k must have the same size");
    longest = {0, 0};
    for (int64_t b = 0; b < p.batch; ++b) {
      longest.queries =
          std::max<int64_t>(longest.queries, p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]);
      longest.keys = std::max<int64_t>(longest.keys, p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
    }
  }
  p.key_starts = positions(op, "key_starts", options.key_starts, p.batch, p.kv_len);
  p.key_lengths = positions(op, "key_lengths", options.key_lengths, p.batch, p.kv_len);
  return longest;
}

// Strides of a tensor of sizes 1 or full, where 1 is broadcast.
HeadsView broadcast_view(const Tensor& t) {
  HeadsView view = heads_view(t);
  for (int d = 0; d < 3; ++d) {
    if (t.size(d) == 1) view.stride[d] = 0;
  }
  return view;
}

void set_bias(const char* op, AttentionParams& p, const Options& options, const Longest& longest) {
  if (options.bias) {
    const Tensor& bias = *options.bias;
    const auto fits = [&](int d, int64_t full) {
      return bias.size(d) == 1 || bias.size(d) >= full;
    };
    STD_TORCH_CHECK(bias.dim() == 4 && fits(0, p.batch) && fits(1, p.heads) &&
                        fits(2, longest.queries) && bias.size(3) >= longest.keys,
                    op, ": bias must be (batch or 1, heads or 1, T or 1, S)");
    p.bias = broadcast_view(bias);
    p.bias_dtype = dtype(bias);
  }
  set_alibi(op, p, options.alibi_slopes);
}

void set_relative(const char* op, AttentionParams& p, const Options& options, const Tensor& query) {
  const int32_t float32 = aoti_torch_dtype_float32(), int32 = aoti_torch_dtype_int32();
  p.position_zero = options.position_zero;
  if (options.distance_bias && options.distance_bias->dim() == 2) {
    p.positions = options.distance_bias->size(1);
  }
  p.distance_bias =
      elements<float>(op, "distance_bias", options.distance_bias, float32, {p.heads, p.positions});
  if (options.position_query || options.position_key) {
    STD_TORCH_CHECK(options.position_query && options.position_key && p.kv_heads == p.heads &&
                        options.position_key->dim() == 4,
                    op, ": position_query and position_key go together, with as many heads as key");
    STD_TORCH_CHECK(!p.distance_bias || options.position_key->size(2) == p.positions, op,
                    ": position_key and distance_bias must be equally long");
    p.positions = options.position_key->size(2);
    check_heads(op, "position_query", *options.position_query, query.size(0), p.heads, p.q_len,
                p.head_dim, query);
    check_heads(op, "position_key", *options.position_key, 1, p.heads, p.positions, p.head_dim,
                query);
    p.position_query = heads_view(*options.position_query);
    p.position_key = heads_view(*options.position_key);
  }
  if (options.segment_scores) {
    STD_TORCH_CHECK(options.query_segments && options.key_segments, op,
                    ": segment_scores need query_segments and key_segments");
    p.segment_scores = elements<float>(op, "segment_scores", options.segment_scores, float32,
                                       {p.batch, p.heads, p.q_len, 2});
    p.query_segments =
        elements<int32_t>(op, "query_segments", options.query_segments, int32, {p.batch, p.q_len});
    p.key_segments =
        elements<int32_t>(op, "key_segments", options.key_segments, int32, {p.batch, p.kv_len});
  }
}
// A score may ask for the bias of any pair that is seen: whether the rows that it needs exist.
void check_distances(const char* op, const AttentionParams& p) {
  if (!p.distance_bias) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t q_len = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.q_len;
    const int64_t kv_len = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.kv_len;
    if (q_len == 0 || kv_len == 0) continue;
    const int64_t offset = p.default_offset ? kv_len - q_len : p.causal_offset;
    int64_t first = 1 - q_len, last = kv_len - 1;
    if (p.window_left >= 0) first = std::max(first, offset - p.window_left);
    const int64_t right = p.causal ? 0 : p.window_right;
    if (right >= 0) last = std::min(last, offset + right);
    STD_TORCH_CHECK(
        first > last || (p.position_zero + first >= 0 && p.position_zero + last < p.positions), op,
        ": distance_bias must hold the distances ", first, " to ", last);
  }
}

AttentionParams params(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                       const Options& options) {
  AttentionParams p;
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, op,
                  ": query, key and value must be (batch, heads, length, head_dim)");
  p.dtype = dtype(query);
  STD_TORCH_CHECK(p.dtype != DType::kBool, op, ": query must be a floating tensor");
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.q_len = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key.size(1);
  p.kv_len = key.size(2);
  p.value_dim = value.size(3);
  STD_TORCH_CHECK(p.head_dim >= 1 && p.value_dim >= 1, op, ": head_dim must be at least 1");
  STD_TORCH_CHECK(p.heads == 0 ? p.kv_heads == 0 : p.kv_heads > 0 && p.heads % p.kv_heads == 0, op,
                  ": key has ", p.kv_heads, " heads, which must divide query's ", p.heads);
  p.query = heads_view(query);
  p.key = heads_view(op, "key", key, p.batch, p.kv_heads, p.kv_len, p.head_dim, query);
  p.value = heads_view(op, "value", value, p.batch, p.kv_heads, p.kv_len, p.value_dim, query);
  p.scale = options.scale;
  p.softcap = options.softcap;
  p.causal = options.causal;
  p.default_offset = !options.causal_offset;
  p.causal_offset = options.causal_offset.value_or(0);
  p.window_left = options.window_left;
  p.window_right = options.window_right;
  p.dropout = dropout(options.dropout_p, options.seed);
  const Longest longest = sequences(op, p, options);
  set_bias(op, p, options, longest);
  set_relative(op, p, options, query);
  check_distances(op, p);
  return p;
}

// (batch, heads, length, dim), in memory (batch, length, heads, dim).
Tensor head_minor(const Tensor& like, int64_t dim) {
  return empty({like.size(0), like.size(1), like.size(2), dim}, scalar_type(like), {0, 2, 1, 3});
}
Tensor head_minor(const Tensor& like) { return head_minor(like, like.size(3)); }

Tensor zeros(std::initializer_list<int64_t> size, int32_t type) {
  Tensor t = empty(size, type);
  if (t.numel() > 0) std::memset(mutable_data<char>(t), 0, t.numel() * t.element_size());
  return t;
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor key_starts,
    OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor seed, OptionalTensor alibi_slopes, OptionalTensor distance_bias,
    OptionalTensor position_query, OptionalTensor position_key, OptionalTensor segment_scores,
    OptionalTensor query_segments, OptionalTensor key_segments, double scale, bool causal,
    std::optional<int64_t> causal_offset, int64_t window_left, int64_t window_right, double softcap,
    int64_t position_zero, double dropout_p, bool save_softmax) {
  const Options options{
      bias,         key_starts,    key_lengths,    cu_seqlens_q,  cu_seqlens_k,   seed,
      alibi_slopes, distance_bias, position_query, position_key,  segment_scores, query_segments,
      key_segments, scale,         causal,         causal_offset, window_left,    window_right,
      softcap,      position_zero, dropout_p};
  AttentionParams p = params("attention_fwd", query, key, value, options);
  Tensor out = head_minor(query, p.value_dim);
  const int32_t float32 = aoti_torch_dtype_float32();
  Tensor lse = empty({query.size(0), query.size(1), query.size(2)}, float32);
  Tensor softmax = save_softmax ? empty({query.size(0), query.size(1), query.size(2), 2}, float32)
                                : nothing(float32);
  p.out = heads_view(out);
  p.lse = mutable_data<float>(lse);
  p.softmax = save_softmax ? mutable_data<float>(softmax) : nullptr;
  kernels().attention_fwd(p, torch_threads());
  return {out, lse, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out,
    Tensor softmax, OptionalTensor bias, OptionalTensor key_starts, OptionalTensor key_lengths,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seed,
    OptionalTensor alibi_slopes, OptionalTensor distance_bias, OptionalTensor position_query,
    OptionalTensor position_key, OptionalTensor segment_scores, OptionalTensor query_segments,
    OptionalTensor key_segments, double scale, bool causal, std::optional<int64_t> causal_offset,
    int64_t window_left, int64_t window_right, double softcap, int64_t position_zero,
    double dropout_p, bool need_dbias) {
  constexpr auto kOp = "attention_bwd";
  AttentionGradParams g;
  g.forward = params(
      kOp, query, key, value,
      {bias,         key_starts,    key_lengths,    cu_seqlens_q,  cu_seqlens_k,   seed,
       alibi_slopes, distance_bias, position_query, position_key,  segment_scores, query_segments,
       key_segments, scale,         causal,         causal_offset, window_left,    window_right,
       softcap,      position_zero, dropout_p});
  const AttentionParams& p = g.forward;
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const int64_t rows = batch * heads * length;
  check_heads(kOp, "grad_out", grad_out, batch, heads, length, p.value_dim, query);
  check_heads(kOp, "out", out, batch, heads, length, p.value_dim, query);
  const auto check_statistic = [&](const char* name, const Tensor& t, int64_t count) {
    STD_TORCH_CHECK(dtype(t) == DType::kFloat32 && t.numel() == count && t.is_contiguous(), kOp,
                    ": ", name, " must hold ", count, " contiguous float32");
  };
  check_statistic("softmax", softmax, 2 * rows);
  OptionalTensor dlse;
  if (grad_lse) {
    dlse = grad_lse->is_contiguous() ? *grad_lse : torch::stable::contiguous(*grad_lse);
    check_statistic("grad_lse", *dlse, rows);
  }
  STD_TORCH_CHECK(!need_dbias || (bias && p.bias_dtype != DType::kBool), kOp,
                  ": there is no floating bias to differentiate by");

  const int32_t float32 = aoti_torch_dtype_float32();
  Tensor dq = head_minor(query), dk = head_minor(key), dv = head_minor(value);
  Tensor dbias = need_dbias
                     ? zeros({bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, float32)
                     : nothing(float32);
  Tensor ddistance = distance_bias ? empty({heads, p.positions}, float32) : nothing(float32);
  Tensor dsegments = segment_scores ? zeros({batch, heads, length, 2}, float32) : nothing(float32);
  Tensor dposition_query = position_query ? head_minor(query) : nothing(scalar_type(query));
  Tensor dposition_key = position_key ? head_minor(*position_key) : nothing(scalar_type(query));
  if (position_key && dposition_key.numel() > 0) {  // where the batch is empty nothing is written
    std::memset(mutable_data<char>(dposition_key), 0,
                dposition_key.numel() * dposition_key.element_size());
  }
  g.forward.out = heads_view(out);
  g.forward.softmax = mutable_data<float>(softmax);
  g.grad_out = heads_view(grad_out);
  g.grad_lse = dlse ? mutable_data<float>(*dlse) : nullptr;
  g.dq = heads_view(dq);
  g.dk = heads_view(dk);
  g.dv = heads_view(dv);
  std::vector<double> dbias_of_rows, ddistance_sums;
  if (need_dbias && bias->size(2) == 1) {
    g.dbias_of_rows = broadcast_view(dbias);
    dbias_of_rows.resize(dbias.numel());
    g.dbias_of_rows.data = dbias_of_rows.data();
  } else if (need_dbias) {
    g.dbias = broadcast_view(dbias);
  }
  if (distance_bias) {
    ddistance_sums.resize(ddistance.numel());
    g.ddistance_bias = ddistance_sums.data();
  }
  if (segment_scores) g.dsegment_scores = mutable_data<float>(dsegments);
  if (position_query) {
    g.dposition_query = heads_view(dposition_query);
    g.dposition_key = heads_view(dposition_key);
  }
  kernels().attention_bwd(g, torch_threads());
  std::copy(dbias_of_rows.begin(), dbias_of_rows.end(), mutable_data<float>(dbias));
  std::copy(ddistance_sums.begin(), ddistance_sums.end(), mutable_data<float>(ddistance));
  return {dq, dk, dv, dbias, ddistance, dposition_query, dposition_key, dsegments};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&ft::bind::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&ft::bind::attention_bwd));
}
