// What the kernels of gated_mlp are told. Letters: M rows (tokens), K input features, F hidden
// features, N output features. Weights are (out, in), as in nn.Linear.
#pragma once
#include "mlp.h"

namespace ft {

// y = (act(gate) ∘ up) w_downᵀ + b_down, gate = x w_gateᵀ + b_gate, up = x w_upᵀ + b_up
struct GatedMlpParams {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
  int64_t m = 0, k = 0, f = 0, n = 0;
  RowsView x, w_gate, w_up, w_down;
  const void *b_gate = nullptr, *b_up = nullptr, *b_down = nullptr;
  RowsView y, gate, up;  // gate and up are kept for backward; both may be absent
};

struct GatedMlpGradParams {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
  int64_t m = 0, k = 0, f = 0, n = 0;
  RowsView grad_out, x, w_gate, w_up, w_down;
  const void *b_gate = nullptr, *b_up = nullptr;
  RowsView gate, up;                     // both absent: made again from x
  RowsView dx, dw_gate, dw_up, dw_down;  // each may be absent
  void *db_gate = nullptr, *db_up = nullptr, *db_down = nullptr;
};

}  // namespace ft
