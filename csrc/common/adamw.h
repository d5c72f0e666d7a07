// What the kernels of AdamW are told: lists of tensors, each dense, all its parts laid out alike,
// so that a tensor is a run of `count` elements.
#pragma once
#include "types.h"

namespace ft {

struct GradientRun {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t count = 0;
};

struct SquaresParams {
  const GradientRun* tensors = nullptr;
  int64_t tensor_count = 0;
};

// One parameter, its gradient and its state, all of one dtype.
struct AdamWRun {
  void* param = nullptr;
  const void* grad = nullptr;
  void *exp_avg = nullptr, *exp_avg_sq = nullptr;
  void* max_exp_avg_sq = nullptr;  // absent without amsgrad
  DType dtype = DType::kFloat32;
  int64_t count = 0;
  float step_size = 0;   // lr / (1 - beta1^t)
  float correction = 0;  // 1 / sqrt(1 - beta2^t)
};

// The constants that a group of parameters shares.
struct AdamWParams {
  const AdamWRun* tensors = nullptr;
  int64_t tensor_count = 0;
  float grad_scale = 1;  // of clipping, of loss scaling; below zero where the objective grows
  double beta1 = 0.9, beta2 = 0.999;
  float decay = 0;  // lr · weight_decay
  float eps = 1e-8f;
};

}  // namespace ft
