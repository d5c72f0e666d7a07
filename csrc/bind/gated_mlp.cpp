// gated_mlp: tensors in, params structs out. Its schemas are in library.cpp.
#include "../common/gated_mlp.h"

#include "linear.h"

namespace ft::bind {
namespace {

// What both passes are told of x and the weights.
template <typename Params>
void set_inputs(const char* op, Params& p, const Tensor& x, const Tensor& w_gate,
                OptionalTensor& b_gate, const Tensor& w_up, OptionalTensor& b_up,
                const Tensor& w_down, int64_t code) {
  p.dtype = checked_dtype(op, x);
  p.activation = activation(op, code);
  p.m = row_count(x);
  p.k = features(x);
  check_weight(op, "w_gate", w_gate, p.k, x);
  check_weight(op, "w_up", w_up, p.k, x);
  p.f = w_gate.size(0);
  STD_TORCH_CHECK(w_up.size(0) == p.f, op, ": w_up must have w_gate's shape");
  check_weight(op, "w_down", w_down, p.f, x);
  p.n = w_down.size(0);
  b_gate = bias(op, "b_gate", b_gate, p.f, x);
  b_up = bias(op, "b_up", b_up, p.f, x);
  p.x = rows_view(x);
  p.w_gate = rows_view(w_gate);
  p.w_up = rows_view(w_up);
  p.w_down = rows_view(w_down);
  p.b_gate = data(b_gate);
  p.b_up = data(b_up);
}

std::tuple<Tensor, Tensor, Tensor> gated_mlp_fwd(Tensor x, Tensor w_gate, OptionalTensor b_gate,
                                                 Tensor w_up, OptionalTensor b_up, Tensor w_down,
                                                 OptionalTensor b_down, int64_t code, bool save) {
  constexpr auto kOp = "gated_mlp_fwd";
  GatedMlpParams p;
  set_inputs(kOp, p, x, w_gate, b_gate, w_up, b_up, w_down, code);
  b_down = bias(kOp, "b_down", b_down, p.n, x);

  const int32_t type = scalar_type(x);
  Tensor y = empty_rows(x, p.n, type);
  Tensor gate = save ? empty_rows(x, p.f, type) : nothing(type);
  Tensor up = save ? empty_rows(x, p.f, type) : nothing(type);
  p.b_down = data(b_down);
  p.y = rows_view(y);
  p.gate = rows_view_or_none(gate, save);
  p.up = rows_view_or_none(up, save);
  kernels().gated_mlp_fwd(p, torch_threads());
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_mlp_bwd(
    Tensor grad_out, Tensor x, Tensor w_gate, OptionalTensor b_gate, Tensor w_up,
    OptionalTensor b_up, Tensor w_down, OptionalTensor gate, OptionalTensor up, int64_t code,
    bool need_dx, bool need_dw_gate, bool need_db_gate, bool need_dw_up, bool need_db_up,
    bool need_dw_down, bool need_db_down) {
  constexpr auto kOp = "gated_mlp_bwd";
  GatedMlpGradParams p;
  set_inputs(kOp, p, x, w_gate, b_gate, w_up, b_up, w_down, code);
  check_rows(kOp, "grad_out", grad_out, p.n, x);
  STD_TORCH_CHECK(gate.has_value() == up.has_value(), kOp, ": gate and up come together");
  if (gate) {
    check_rows(kOp, "gate", *gate, p.f, x);
    check_rows(kOp, "up", *up, p.f, x);
  }

  Tensor dx = gradient_of(x, need_dx), dw_gate = gradient_of(w_gate, need_dw_gate);
  Tensor dw_up = gradient_of(w_up, need_dw_up), dw_down = gradient_of(w_down, need_dw_down);
  Tensor db_gate = gradient_of_bias(w_gate, need_db_gate);
  Tensor db_up = gradient_of_bias(w_up, need_db_up);
  Tensor db_down = gradient_of_bias(w_down, need_db_down);
  p.grad_out = rows_view(grad_out);
  p.gate = rows_view(gate);
  p.up = rows_view(up);
  p.dx = rows_view_or_none(dx, need_dx);
  p.dw_gate = rows_view_or_none(dw_gate, need_dw_gate);
  p.dw_up = rows_view_or_none(dw_up, need_dw_up);
  p.dw_down = rows_view_or_none(dw_down, need_dw_down);
  p.db_gate = data_or_none(db_gate, need_db_gate);
  p.db_up = data_or_none(db_up, need_db_up);
  p.db_down = data_or_none(db_down, need_db_down);
  kernels().gated_mlp_bwd(p, torch_threads());
  return {dx, dw_gate, db_gate, dw_up, db_up, dw_down, db_down};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("gated_mlp_fwd", TORCH_BOX(&ft::bind::gated_mlp_fwd));
  m.impl("gated_mlp_bwd", TORCH_BOX(&ft::bind::gated_mlp_bwd));
}
