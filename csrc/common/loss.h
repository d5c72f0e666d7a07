// What a loss kernel is told. Of row r with logits x, target t and lse = log Σ e^x:
//   loss = lse - (1 - label_smoothing) x[t] - label_smoothing mean(x) + z_loss lse²
#pragma once
#include "types.h"

namespace ft {

enum class Reduction : int32_t { kNone, kMean, kSum };

struct LossOptions {
  int64_t ignore_index = -100;  // rows with this target do not count and are not read
  float label_smoothing = 0.0f, z_loss = 0.0f;
  Reduction reduction = Reduction::kMean;
};

// A row's largest logit m and Σ e^(x - m): what backward needs of it. Zeros where it is ignored.
struct RowStatistics {
  float maximum, total;
};

struct CrossEntropyParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, classes = 0;
  RowsView logits;
  const int64_t* target = nullptr;  // (rows,), each ignore_index or in [0, classes)
  LossOptions options;
  float* loss = nullptr;                // (rows,), or one element where rows are reduced
  RowStatistics* statistics = nullptr;  // (rows,)
};

struct CrossEntropyGradParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, classes = 0;
  RowsView logits;
  const int64_t* target = nullptr;
  LossOptions options;
  const float* grad_loss = nullptr;  // of loss's shape
  const RowStatistics* statistics = nullptr;
  RowsView dlogits;
};

// The logits are hidden · weightᵀ + bias.
struct LinearCrossEntropyParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, channels = 0, classes = 0;
  RowsView hidden, weight;     // (rows, channels), (classes, channels)
  const void* bias = nullptr;  // (classes,)
  const int64_t* target = nullptr;
  LossOptions options;
  float* loss = nullptr;
  RowStatistics* statistics = nullptr;
};

struct LinearCrossEntropyGradParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, channels = 0, classes = 0;
  RowsView hidden, weight;
  const void* bias = nullptr;
  const int64_t* target = nullptr;
  LossOptions options;
  const float* grad_loss = nullptr;
  const RowStatistics* statistics = nullptr;
  RowsView dhidden, dweight;  // each may be absent
  void* dbias = nullptr;
};

}  // namespace ft
