// linear_act and mlp: tensors in, params structs out. Their schemas are in library.cpp.
#include "../common/mlp.h"

#include "linear.h"

namespace ft::bind {
namespace {

std::tuple<Tensor, Tensor> linear_act_fwd(Tensor x, Tensor weight, OptionalTensor b, int64_t code,
                                          bool save_pre) {
  constexpr auto kOp = "linear_act_fwd";
  LinearParams p;
  p.dtype = checked_dtype(kOp, x);
  check_weight(kOp, "weight", weight, features(x), x);
  b = bias(kOp, "bias", b, weight.size(0), x);
  p.activation = activation(kOp, code);
  p.m = row_count(x);
  p.n = weight.size(0);
  p.k = features(x);
  save_pre = save_pre && p.activation != Activation::kIdentity;

  const int32_t type = scalar_type(x);
  Tensor y = empty_rows(x, p.n, type);
  Tensor pre = save_pre ? empty_rows(x, p.n, type) : nothing(type);
  p.x = rows_view(x);
  p.weight = matrix_view(weight);
  p.bias = data(b);
  p.y = rows_view(y);
  p.pre = rows_view_or_none(pre, save_pre);
  kernels().linear_act_fwd(p, torch_threads());
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor> linear_act_bwd(Tensor grad_out, Tensor x, Tensor weight,
                                                  Tensor pre, int64_t code, bool need_dx,
                                                  bool need_dw, bool need_db) {
  constexpr auto kOp = "linear_act_bwd";
  LinearGradParams p;
  p.dtype = checked_dtype(kOp, x);
  check_weight(kOp, "weight", weight, features(x), x);
  p.activation = activation(kOp, code);
  p.m = row_count(x);
  p.n = weight.size(0);
  p.k = features(x);
  check_rows(kOp, "grad_out", grad_out, p.n, x);
  const bool has_pre = p.activation != Activation::kIdentity;
  if (has_pre) check_rows(kOp, "pre", pre, p.n, x);

  Tensor dx = gradient_of(x, need_dx), dw = gradient_of_weight(weight, need_dw);
  Tensor db = gradient_of_bias(weight, need_db);
  p.grad_out = rows_view(grad_out);
  p.x = rows_view(x);
  p.weight = matrix_view(weight);
  p.pre = rows_view_or_none(pre, has_pre);
  p.dx = rows_view_or_none(dx, need_dx);
  p.dw = matrix_view_or_none(dw, need_dw);
  p.db = data_or_none(db, need_db);
  kernels().linear_act_bwd(p, torch_threads());
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor> mlp_fwd(Tensor x, Tensor w1, OptionalTensor b1, Tensor w2,
                                   OptionalTensor b2, OptionalTensor seed, int64_t code,
                                   double dropout_p, bool save_pre) {
  constexpr auto kOp = "mlp_fwd";
  MlpParams p;
  p.dtype = checked_dtype(kOp, x);
  check_weight(kOp, "w1", w1, features(x), x);
  check_weight(kOp, "w2", w2, w1.size(0), x);
  b1 = bias(kOp, "b1", b1, w1.size(0), x);
  b2 = bias(kOp, "b2", b2, w2.size(0), x);
  p.activation = activation(kOp, code);
  p.m = row_count(x);
  p.k = features(x);
  p.f = w1.size(0);
  p.n = w2.size(0);

  const int32_t type = scalar_type(x);
  Tensor y = empty_rows(x, p.n, type);
  Tensor pre = save_pre ? empty_rows(x, p.f, type) : nothing(type);
  p.x = rows_view(x);
  p.w1 = matrix_view(w1);
  p.w2 = matrix_view(w2);
  p.b1 = data(b1);
  p.b2 = data(b2);
  p.y = rows_view(y);
  p.pre = rows_view_or_none(pre, save_pre);
  p.dropout = dropout(dropout_p, seed);
  kernels().mlp_fwd(p, torch_threads());
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(
    Tensor grad_out, Tensor x, Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor pre,
    OptionalTensor seed, int64_t code, double dropout_p, bool need_dx, bool need_dw1, bool need_db1,
    bool need_dw2, bool need_db2) {
  constexpr auto kOp = "mlp_bwd";
  MlpGradParams p;
  p.dtype = checked_dtype(kOp, x);
  check_weight(kOp, "w1", w1, features(x), x);
  check_weight(kOp, "w2", w2, w1.size(0), x);
  p.activation = activation(kOp, code);
  p.m = row_count(x);
  p.k = features(x);
  p.f = w1.size(0);
  p.n = w2.size(0);
  check_rows(kOp, "grad_out", grad_out, p.n, x);
  if (pre) check_rows(kOp, "pre", *pre, p.f, x);
  b1 = bias(kOp, "b1", b1, p.f, x);

  Tensor dx = gradient_of(x, need_dx), dw1 = gradient_of_weight(w1, need_dw1);
  Tensor db1 = gradient_of_bias(w1, need_db1), dw2 = gradient_of_weight(w2, need_dw2);
  Tensor db2 = gradient_of_bias(w2, need_db2);
  p.grad_out = rows_view(grad_out);
  p.x = rows_view(x);
  p.w1 = matrix_view(w1);
  p.w2 = matrix_view(w2);
  p.b1 = data(b1);
  p.pre = rows_view(pre);
  p.dx = rows_view_or_none(dx, need_dx);
  p.dw1 = matrix_view_or_none(dw1, need_dw1);
  p.dw2 = matrix_view_or_none(dw2, need_dw2);
  p.db1 = data_or_none(db1, need_db1);
  p.db2 = data_or_none(db2, need_db2);
  p.dropout = dropout(dropout_p, seed);
  kernels().mlp_bwd(p, torch_threads());
  return {dx, dw1, db1, dw2, db2};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("linear_act_fwd", TORCH_BOX(&ft::bind::linear_act_fwd));
  m.impl("linear_act_bwd", TORCH_BOX(&ft::bind::linear_act_bwd));
  m.impl("mlp_fwd", TORCH_BOX(&ft::bind::mlp_fwd));
  m.impl("mlp_bwd", TORCH_BOX(&ft::bind::mlp_bwd));
}
