// What the kernels of linear_act and mlp are told. Letters: M rows (tokens), K input features,
// F hidden features, N output features. Weights are (out, in), as in nn.Linear, in memory so or
// transposed, as in the Conv1D of GPT-2; their gradients lie as they do.
#pragma once
#include "philox.h"
#include "types.h"

namespace ft {

enum class Activation : int32_t { kIdentity, kGelu, kGeluTanh, kRelu, kSilu };

// y = act(x weightᵀ + bias)
struct LinearParams {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t m = 0, n = 0, k = 0;
  RowsView x;
  MatrixView weight;
  const void* bias = nullptr;
  RowsView y, pre;  // pre: x weightᵀ + bias, kept for backward; may be absent
};

struct LinearGradParams {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t m = 0, n = 0, k = 0;
  RowsView grad_out, x, pre;
  MatrixView weight;
  RowsView dx;  // each may be absent
  MatrixView dw;
  void* db = nullptr;  // may be absent
};

// y = dropout(act(x w1ᵀ + b1)) w2ᵀ + b2
struct MlpParams {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kGelu;
  int64_t m = 0, k = 0, f = 0, n = 0;
  RowsView x;
  MatrixView w1, w2;
  const void *b1 = nullptr, *b2 = nullptr;
  RowsView y, pre;  // pre: x w1ᵀ + b1, kept for backward; may be absent
  Dropout dropout;
};

struct MlpGradParams {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kGelu;
  int64_t m = 0, k = 0, f = 0, n = 0;
  RowsView grad_out, x;
  MatrixView w1, w2;
  const void* b1 = nullptr;
  RowsView pre;  // absent: made again from x
  RowsView dx;   // each may be absent
  MatrixView dw1, dw2;
  void *db1 = nullptr, *db2 = nullptr;
  Dropout dropout;
};

}  // namespace ft
