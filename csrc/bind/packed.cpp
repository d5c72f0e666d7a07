// Packed weights: tensors in, params structs out. Their schemas are in library.cpp. None has a
// gradient.
#include "../common/packed.h"

#include "linear.h"

namespace ft::bind {
namespace {

int32_t int8() { return aoti_torch_dtype_int8(); }

Tensor pack_weight(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && dtype(weight) != DType::kBool,
                  "pack_weight: weight must be a floating (out, in) tensor");
  const int64_t n = weight.size(0), k = weight.size(1);
  Tensor packed = empty({kernels().packed_bytes(dtype(weight), n, k)}, int8());
  kernels().pack_weight(dtype(weight), n, k, rows_view(weight), packed.mutable_data_ptr(),
                        torch_threads());
  return packed;
}

PackedWeight packed(const char* op, const Tensor& weight, const OptionalTensor& scale, int64_t n,
                    int64_t k, DType type) {
  STD_TORCH_CHECK(scalar_type(weight) == int8() && weight.is_contiguous(), op,
                  ": a packed weight is contiguous int8");
  if (!scale) {
    STD_TORCH_CHECK(weight.dim() == 1 && weight.numel() == kernels().packed_bytes(type, n, k), op,
                    ": the packed weight is of another size, dtype or instruction set");
    return {weight.const_data_ptr(), {}, nullptr};
  }
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k, op,
                  ": a weight of int8 must be (", n, ", ", k, ")");
  STD_TORCH_CHECK(scale->dim() == 1 && scale->size(0) == n && scale->is_contiguous() &&
                      dtype(*scale) == DType::kFloat32,
                  op, ": scale must be (", n, ",), contiguous float32");
  return {nullptr, rows_view(weight), static_cast<const float*>(scale->const_data_ptr())};
}

Tensor packed_linear(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor b,
                     int64_t out_features, int64_t code) {
  constexpr auto kOp = "packed_linear";
  PackedLinearParams packed_params;
  LinearParams& p = packed_params.layer;
  p.dtype = checked_dtype(kOp, x);
  p.activation = activation(kOp, code);
  p.m = row_count(x);
  p.n = out_features;
  p.k = features(x);
  packed_params.weight = packed(kOp, weight, scale, p.n, p.k, p.dtype);
  b = bias(kOp, "bias", b, p.n, x);
  Tensor y = empty_rows(x, p.n, scalar_type(x));
  p.x = rows_view(x);
  p.bias = data(b);
  p.y = rows_view(y);
  kernels().packed_linear(packed_params, torch_threads());
  return y;
}

Tensor packed_mlp(Tensor x, Tensor w1, OptionalTensor scale1, OptionalTensor b1, Tensor w2,
                  OptionalTensor scale2, OptionalTensor b2, int64_t hidden_features,
                  int64_t out_features, int64_t code) {
  constexpr auto kOp = "packed_mlp";
  PackedMlpParams packed_params;
  MlpParams& p = packed_params.layers;
  p.dtype = checked_dtype(kOp, x);
  p.activation = activation(kOp, code);
  p.m = row_count(x);
  p.k = features(x);
  p.f = hidden_features;
  p.n = out_features;
  packed_params.w1 = packed(kOp, w1, scale1, p.f, p.k, p.dtype);
  packed_params.w2 = packed(kOp, w2, scale2, p.n, p.f, p.dtype);
  b1 = bias(kOp, "b1", b1, p.f, x);
  b2 = bias(kOp, "b2", b2, p.n, x);
  Tensor y = empty_rows(x, p.n, scalar_type(x));
  p.x = rows_view(x);
  p.b1 = data(b1);
  p.b2 = data(b2);
  p.y = rows_view(y);
  kernels().packed_mlp(packed_params, torch_threads());
  return y;
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&ft::bind::pack_weight));
  m.impl("packed_linear", TORCH_BOX(&ft::bind::packed_linear));
  m.impl("packed_mlp", TORCH_BOX(&ft::bind::packed_mlp));
}
