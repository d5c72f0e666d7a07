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

// Each layer as in mlp.h, but for the weights, which stand beside it.
struct PackedLinearParams {
  LinearParams layer;
  PackedWeight weight;
};
struct PackedMlpParams {
  MlpParams layers;
  PackedWeight w1, w2;
};

}  // namespace ft
