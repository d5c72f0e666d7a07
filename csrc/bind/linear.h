// What the bindings of linear layers and of their losses share: checks of rows, weights and biases,
// and the tensors that gradients go into.
#pragma once
#include "../common/mlp.h"
#include "tensor.h"

namespace ft::bind {

inline Activation activation(const char* op, int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Activation::kSilu), op,
                  ": unknown activation");
  return static_cast<Activation>(code);
}
inline void check_rows(const char* op, const char* name, const Tensor& t, int64_t features,
                       const Tensor& x) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == features && row_count(t) == row_count(x) &&
                      scalar_type(t) == scalar_type(x),
                  op, ": ", name, " must have x's rows and dtype, and ", features, " columns");
}
inline void check_weight(const char* op, const char* name, const Tensor& t, int64_t in,
                         const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == in && scalar_type(t) == scalar_type(x), op, ": ",
                  name, " must be (out, ", in, ") of the input's dtype");
}
inline OptionalTensor bias(const char* op, const char* name, const OptionalTensor& t, int64_t out,
                           const Tensor& x) {
  if (!t) return t;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == out && scalar_type(*t) == scalar_type(x), op, ": ",
                  name, " must be (", out, ",) of the input's dtype");
  return t->is_contiguous() ? t : OptionalTensor(torch::stable::contiguous(*t));
}
// Raises unless x is a floating tensor of at least one dimension; returns its dtype.
inline DType checked_dtype(const char* op, const Tensor& x, const char* name = "x") {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": ", name, " must have at least one dimension");
  STD_TORCH_CHECK(dtype(x) != DType::kBool, op, ": ", name, " must be a floating tensor");
  return dtype(x);
}
inline int64_t features(const Tensor& x) { return x.size(x.dim() - 1); }

inline Tensor gradient_of(const Tensor& x, bool wanted) {
  return wanted ? empty_rows(x, features(x), scalar_type(x)) : nothing(scalar_type(x));
}
// A weight (out, in) whose rows are contiguous, or whose columns are.
inline MatrixView matrix_view(const Tensor& t) {
  if (t.stride(1) == 1 || t.size(1) <= 1) return {rows_view(t), false};
  STD_TORCH_CHECK(t.stride(0) == 1 || t.size(0) <= 1,
                  "fast_transformer: a weight's rows or its columns must be contiguous");
  return {{t.const_data_ptr(), {t.stride(1)}}, true};
}
inline MatrixView matrix_view_or_none(const Tensor& t, bool wanted) {
  return wanted ? matrix_view(t) : MatrixView{};
}
inline Tensor gradient_of_weight(const Tensor& weight, bool wanted) {
  if (!wanted || !matrix_view(weight).transposed) return gradient_of(weight, wanted);
  return empty({weight.size(0), weight.size(1)}, scalar_type(weight), {1, 0});
}
inline Tensor gradient_of_bias(const Tensor& weight, bool wanted) {
  return empty({wanted ? weight.size(0) : 0}, scalar_type(weight));
}
inline void* data_or_none(const Tensor& t, bool wanted) {
  return wanted ? t.mutable_data_ptr() : nullptr;
}

}  // namespace ft::bind
