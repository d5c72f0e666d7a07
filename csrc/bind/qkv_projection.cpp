// qkv_projection: tensors in, params structs out. Its schemas are in library.cpp.
#include "../common/qkv_projection.h"

#include "linear.h"

namespace ft::bind {
namespace {

constexpr int kParts = 3;
using Parts = OptionalTensor[kParts];

// Rows [begin, begin + count) of a weight, elements of a bias.
const void* at(const DType dtype, const void* from, int64_t elements) {
  return static_cast<const char*>(from) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

// The weights, of which the first may hold all three; `features` are query's and key's columns.
template <typename Params>
void set_weights(const char* op, Params& p, const Tensor& x, const Parts& weights,
                 int64_t query_features, int64_t kv_features) {
  p.dtype = checked_dtype(op, x);
  p.m = row_count(x);
  p.k = features(x);
  const bool packed = !weights[1];
  STD_TORCH_CHECK(weights[1].has_value() == weights[2].has_value(), op,
                  ": the weights are one or three");
  int64_t before = 0;
  for (int i = 0; i < kParts; ++i) {
    p.n[i] = i == 0 ? query_features : kv_features;
    const Tensor& weight = packed ? *weights[0] : *weights[i];
    check_weight(op, "a weight", weight, p.k, x);
    STD_TORCH_CHECK(weight.size(0) == (packed ? query_features + 2 * kv_features : p.n[i]), op,
                    ": a weight's rows must be the heads' features");
    p.weight[i] = rows_view(weight);
    if (packed) p.weight[i].data = at(p.dtype, p.weight[i].data, before * p.weight[i].stride[0]);
    before += p.n[i];
  }
  p.x = rows_view(x);
}

// (batch, heads, length, head_dim) laid out in the order of x's rows, or (tokens, heads, head_dim).
Tensor heads_of(const Tensor& x, int64_t heads, int64_t dim) {
  const int32_t type = scalar_type(x);
  if (x.dim() == 2) return empty({x.size(0), heads, dim}, type);
  return empty({x.size(0), heads, x.size(1), dim}, type, {0, 2, 1, 3});
}

std::tuple<Tensor, Tensor, Tensor> qkv_projection_fwd(
    Tensor x, Tensor weight, OptionalTensor key_weight, OptionalTensor value_weight,
    OptionalTensor query_bias, OptionalTensor key_bias, OptionalTensor value_bias, int64_t heads,
    int64_t kv_heads) {
  constexpr auto kOp = "qkv_projection_fwd";
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, kOp, ": x must have two or three dimensions");
  STD_TORCH_CHECK(heads > 0 && kv_heads > 0, kOp, ": heads and kv_heads must be positive");
  const bool packed = !key_weight;
  const int64_t dim = weight.size(0) / (packed ? heads + 2 * kv_heads : heads);
  QkvProjectionParams p;
  set_weights(kOp, p, x, Parts{weight, key_weight, value_weight}, heads * dim, kv_heads * dim);

  Parts biases{query_bias, key_bias, value_bias};
  Tensor out[kParts] = {heads_of(x, heads, dim), heads_of(x, kv_heads, dim),
                        heads_of(x, kv_heads, dim)};
  int64_t before = 0;
  if (packed) biases[0] = bias(kOp, "bias", biases[0], weight.size(0), x);
  for (int i = 0; i < kParts; ++i) {
    if (packed) {
      if (biases[0]) p.bias[i] = at(p.dtype, data(biases[0]), before);
    } else {
      biases[i] = bias(kOp, "a bias", biases[i], p.n[i], x);
      p.bias[i] = data(biases[i]);
    }
    p.out[i] = {out[i].mutable_data_ptr(), {p.n[i]}};
    before += p.n[i];
  }
  kernels().qkv_projection_fwd(p, torch_threads());
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qkv_projection_bwd(
    Tensor dq, Tensor dk, Tensor dv, Tensor x, Tensor weight, OptionalTensor key_weight,
    OptionalTensor value_weight, bool need_dx, bool need_dweight, bool need_dkey_weight,
    bool need_dvalue_weight, bool need_dbias, bool need_dkey_bias, bool need_dvalue_bias) {
  constexpr auto kOp = "qkv_projection_bwd";
  QkvProjectionGradParams p;
  const auto columns = [&](const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == x.dim() + 1 && t.is_contiguous() && scalar_type(t) == scalar_type(x),
                    kOp, ": gradients must be contiguous, of x's rows and dtype");
    return t.size(t.dim() - 2) * t.size(t.dim() - 1);
  };
  const Tensor* grads[kParts] = {&dq, &dk, &dv};
  const bool packed = !key_weight;
  const Parts weights{weight, key_weight, value_weight};
  set_weights(kOp, p, x, weights, columns(dq), columns(dk));
  STD_TORCH_CHECK(columns(dv) == p.n[2], kOp, ": dv must have dk's features");
  const bool need_dw[kParts] = {need_dweight, need_dkey_weight, need_dvalue_weight};
  const bool need_db[kParts] = {need_dbias, need_dkey_bias, need_dvalue_bias};

  const int32_t type = scalar_type(x);
  Tensor dx = gradient_of(x, need_dx);
  Tensor dw[kParts] = {nothing(type), nothing(type), nothing(type)};
  Tensor db[kParts] = {nothing(type), nothing(type), nothing(type)};
  int64_t before = 0;
  for (int i = 0; i < kParts; ++i) {
    STD_TORCH_CHECK(grads[i]->numel() == p.m * p.n[i], kOp, ": gradients must have x's rows");
    p.grad_out[i] = {grads[i]->const_data_ptr(), {p.n[i]}};
    const int part = packed ? 0 : i;  // whose tensor the gradient goes into
    if (need_dw[part]) {
      if (i == part) dw[i] = gradient_of(*weights[i], true);
      p.dw[i] = {at(p.dtype, dw[part].mutable_data_ptr(), packed ? before * p.k : 0), {p.k}};
    }
    if (need_db[part]) {
      if (i == part) db[i] = gradient_of_bias(*weights[i], true);
      p.db[i] = const_cast<void*>(at(p.dtype, db[part].mutable_data_ptr(), packed ? before : 0));
    }
    before += p.n[i];
  }
  p.dx = rows_view_or_none(dx, need_dx);
  kernels().qkv_projection_bwd(p, torch_threads());
  return {dx, dw[0], dw[1], dw[2], db[0], db[1], db[2]};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("qkv_projection_fwd", TORCH_BOX(&ft::bind::qkv_projection_fwd));
  m.impl("qkv_projection_bwd", TORCH_BOX(&ft::bind::qkv_projection_bwd));
}
