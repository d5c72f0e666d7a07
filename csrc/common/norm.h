// What a norm kernel is told: h = residual + dropout(x), out = (h - mean) * rstd * weight + bias;
// RMS norm has neither mean nor bias.
#pragma once
#include "philox.h"
#include "types.h"

namespace ft {

enum class NormKind : int32_t { kLayer, kRms };

struct NormParams {
  NormKind norm = NormKind::kLayer;
  DType dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;  // of weight
  DType bias_dtype = DType::kFloat32;
  int64_t rows = 0, channels = 0;
  RowsView x, residual;  // residual may be absent: then h = x
  const void* weight = nullptr;
  const void* bias = nullptr;
  RowsView out, sum;                       // sum may be absent: then h is never written
  float *mean = nullptr, *rstd = nullptr;  // (rows,); mean for layer norm alone, both may be absent
  float eps = 1e-5f;
  Dropout dropout;
};

struct NormGradParams {
  NormKind norm = NormKind::kLayer;
  DType dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
  int64_t rows = 0, channels = 0;
  RowsView grad_out, grad_sum;  // grad_sum may be absent
  RowsView sum;                 // what was normalised
  const float *mean = nullptr, *rstd = nullptr;
  const void* weight = nullptr;
  RowsView dresidual, dx;                      // dx may be absent: then it equals dresidual
  float *dweight = nullptr, *dbias = nullptr;  // (channels,), either may be absent
  Dropout dropout;
};

}  // namespace ft
