// What the kernels of packed weights are told: layers whose weights were prepared once, for many
// calls without a gradient. Letters as in mlp.h.
#pragma once
#include "mlp.h"

namespace ft {

// A weight (out, in) as panels, made by pack_weight; or, where there is a scale for each output, as
// rows of int8, which stand for themselves times their scale.
struct PackedWeight {
  const void* panels = nullptr;
  RowsView rows;
  const float* scale = nullptr;
};

struct PackedLinearParams {
  DType dtype = DType::kFloat32;  // of x, bias and y, and of the weight that was packed
  Activation activation = Activation::kIdentity;
  int64_t m = 0, n = 0, k = 0;
  RowsView x;
  PackedWeight weight;
  const void* bias = nullptr;
  RowsView y;
};

struct PackedMlpParams {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kGelu;
  int64_t m = 0, k = 0, f = 0, n = 0;
  RowsView x;
  PackedWeight w1, w2;
  const void *b1 = nullptr, *b2 = nullptr;
  RowsView y;
};

}  // namespace ft
