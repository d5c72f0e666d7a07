// What the kernels of qkv_projection are told. Letters: M rows (tokens), K input features. Weights
// are (out, in), as in nn.Linear; the three are query's, key's and value's.
#pragma once
#include "types.h"

namespace ft {

// out[i] = x weight[i]ᵀ + bias[i]
struct QkvProjectionParams {
  DType dtype = DType::kFloat32;
  int64_t m = 0, k = 0, n[3] = {};
  RowsView x, weight[3];
  const void* bias[3] = {};
  RowsView out[3];
};

struct QkvProjectionGradParams {
  DType dtype = DType::kFloat32;
  int64_t m = 0, k = 0, n[3] = {};
  RowsView grad_out[3], x, weight[3];
  RowsView dx, dw[3];  // each may be absent
  void* db[3] = {};
};

}  // namespace ft
