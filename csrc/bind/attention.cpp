// attention_fwd, attention_bwd: tensors in, params structs out. Their schemas are in library.cpp.
#include "../common/attention.h"

#include <algorithm>

#include "tensor.h"

namespace ft::bind {
namespace {

// What both passes take beside query, key and value.
struct Options {
  OptionalTensor bias, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed;
  double scale;
  bool causal;
  std::optional<int64_t> causal_offset;
  double dropout_p;
};

void check_heads(const char* op, const char* name, const Tensor& t, int64_t batch, int64_t heads,
                 int64_t length, const Tensor& query) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(2) == length &&
                      t.size(3) == query.size(3) && scalar_type(t) == scalar_type(query),
                  op, ": ", name, " must be (", batch, ", ", heads, ", ", length, ", ",
                  query.size(3), ") of query's dtype");
}

// Positions are read by the kernel as addresses: a second line of defence behind Python's checks.
const int32_t* positions(const char* op, const char* name, const OptionalTensor& t, int64_t count,
                         int64_t most) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == count && t->is_contiguous() &&
                      scalar_type(*t) == aoti_torch_dtype_int32(),
                  op, ": ", name, " must be (", count, ",), contiguous int32");
  const auto* values = static_cast<const int32_t*>(t->const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
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

AttentionParams params(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                       const Options& options) {
  AttentionParams p;
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, op,
                  ": query and key must be (batch, heads, length, head_dim)");
  p.dtype = dtype(query);
  STD_TORCH_CHECK(p.dtype != DType::kBool, op, ": query must be a floating tensor");
  STD_TORCH_CHECK(query.size(3) >= 1, op, ": head_dim must be at least 1");
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.q_len = query.size(2);
  p.kv_len = key.size(2);
  p.head_dim = query.size(3);
  check_heads(op, "key", key, p.batch, p.heads, p.kv_len, query);
  check_heads(op, "value", value, p.batch, p.heads, p.kv_len, query);
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.value = heads_view(value);

  int64_t longest_q = p.q_len, longest_k = p.kv_len;  // what bias has to cover
  if (options.cu_seqlens_q) {
    STD_TORCH_CHECK(
        p.batch == 1 && options.cu_seqlens_k && !options.key_starts && !options.key_lengths, op,
        ": packed sequences are one batch, without key_starts or key_lengths");
    p.cu_seqlens_q = offsets(op, "cu_seqlens_q", options.cu_seqlens_q, p.q_len);
    p.cu_seqlens_k = offsets(op, "cu_seqlens_k", options.cu_seqlens_k, p.kv_len);
    p.batch = options.cu_seqlens_q->size(0) - 1;
    STD_TORCH_CHECK(options.cu_seqlens_k->size(0) == p.batch + 1, op,
                    ": cu_seqlens_q and cu_seqlens_k must have the same size");
    longest_q = longest_k = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      longest_q = std::max<int64_t>(longest_q, p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]);
      longest_k = std::max<int64_t>(longest_k, p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
    }
  }
  p.key_starts = positions(op, "key_starts", options.key_starts, p.batch, p.kv_len);
  p.key_lengths = positions(op, "key_lengths", options.key_lengths, p.batch, p.kv_len);
  if (options.bias) {
    const Tensor& bias = *options.bias;
    STD_TORCH_CHECK(bias.dim() == 4 && bias.size(0) == p.batch && bias.size(1) == p.heads &&
                        bias.size(2) >= longest_q && bias.size(3) >= longest_k,
                    op, ": bias must be expanded to (batch, heads, T, S)");
    p.bias = heads_view(bias);
    p.bias_dtype = dtype(bias);
  }
  p.scale = options.scale;
  p.causal = options.causal;
  p.default_offset = !options.causal_offset;
  p.causal_offset = options.causal_offset.value_or(0);
  p.dropout = dropout(options.dropout_p, options.seed);
  return p;
}

// Like t (batch, heads, length, head_dim), in memory (batch, length, heads, head_dim).
Tensor head_minor(const Tensor& t) {
  return empty({t.size(0), t.size(1), t.size(2), t.size(3)}, scalar_type(t), {0, 2, 1, 3});
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor key_starts,
    OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor seed, double scale, bool causal, std::optional<int64_t> causal_offset,
    double dropout_p, bool save_softmax) {
  AttentionParams p = params("attention_fwd", query, key, value,
                             {bias, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed,
                              scale, causal, causal_offset, dropout_p});
  Tensor out = head_minor(query);
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

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out,
    Tensor softmax, OptionalTensor bias, OptionalTensor key_starts, OptionalTensor key_lengths,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seed, double scale,
    bool causal, std::optional<int64_t> causal_offset, double dropout_p) {
  constexpr auto kOp = "attention_bwd";
  AttentionGradParams g;
  g.forward = params(kOp, query, key, value,
                     {bias, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, scale,
                      causal, causal_offset, dropout_p});
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const int64_t rows = batch * heads * length;
  check_heads(kOp, "grad_out", grad_out, batch, heads, length, query);
  check_heads(kOp, "out", out, batch, heads, length, query);
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

  Tensor dq = head_minor(query), dk = head_minor(key), dv = head_minor(value);
  g.forward.out = heads_view(out);
  g.forward.softmax = mutable_data<float>(softmax);
  g.grad_out = heads_view(grad_out);
  g.grad_lse = dlse ? mutable_data<float>(*dlse) : nullptr;
  g.dq = heads_view(dq);
  g.dk = heads_view(dk);
  g.dv = heads_view(dv);
  kernels().attention_bwd(g, torch_threads());
  return {dq, dk, dv};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&ft::bind::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&ft::bind::attention_bwd));
}
