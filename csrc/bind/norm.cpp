// norm, norm_fwd, norm_bwd: tensors in, params structs out. Their schemas are in library.cpp.
#include "../common/norm.h"

#include "tensor.h"

namespace ft::bind {
namespace {

// weight or bias: (C,) of x's dtype or float32, copied where it is not contiguous.
OptionalTensor parameter(const char* op, const char* name, const OptionalTensor& t,
                         const Tensor& x) {
  if (!t) return t;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(x.dim() - 1), op, ": ", name,
                  " must have one element for each of x's channels");
  STD_TORCH_CHECK(dtype(*t) == dtype(x) || dtype(*t) == DType::kFloat32, op, ": ", name,
                  " must be float32 or of x's dtype");
  return t->is_contiguous() ? t : OptionalTensor(torch::stable::contiguous(*t));
}
DType dtype_or(const OptionalTensor& t, DType absent) { return t ? dtype(*t) : absent; }

void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim() && scalar_type(t) == scalar_type(like);
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and dtype of the rows it goes with");
}
void check_statistic(const char* name, const Tensor& t, int64_t rows) {
  STD_TORCH_CHECK(dtype(t) == DType::kFloat32 && t.numel() == rows && t.is_contiguous(),
                  "norm_bwd: ", name, " must hold one float32 for each row");
}

// The code of a norm; RMS norm has neither mean nor bias.
NormKind kind(const char* op, int64_t norm) {
  STD_TORCH_CHECK(norm == 0 || norm == 1, op, ": norm must be 0 (layer norm) or 1 (RMS norm)");
  return norm == 1 ? NormKind::kRms : NormKind::kLayer;
}

// Checks what both forward operators take; all but the outputs is set. `weight` and `bias` become
// what the parameters point to.
NormParams forward_params(const char* op, const Tensor& x, const OptionalTensor& residual,
                          OptionalTensor& weight, OptionalTensor& bias, const OptionalTensor& seed,
                          int64_t norm, double eps, double dropout_p) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  STD_TORCH_CHECK(dtype(x) != DType::kBool, op, ": x must be a floating tensor");
  if (residual) check_rows(op, "residual", *residual, x);
  weight = parameter(op, "weight", weight, x);
  bias = parameter(op, "bias", bias, x);

  NormParams p;
  p.norm = kind(op, norm);
  STD_TORCH_CHECK(!(bias && p.norm == NormKind::kRms), op, ": RMS norm has no bias");
  p.dtype = dtype(x);
  p.weight_dtype = dtype_or(weight, p.dtype);
  p.bias_dtype = dtype_or(bias, p.dtype);
  p.rows = row_count(x);
  p.channels = x.size(x.dim() - 1);
  p.x = rows_view(x);
  p.residual = rows_view(residual);
  p.weight = data(weight);
  p.bias = data(bias);
  p.eps = static_cast<float>(eps);
  p.dropout = dropout(dropout_p, seed);
  return p;
}

Tensor norm(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
            OptionalTensor seed, int64_t norm, double eps, double dropout_p) {
  NormParams p = forward_params("norm", x, residual, weight, bias, seed, norm, eps, dropout_p);
  Tensor out = empty_rows(x, p.channels, scalar_type(x));
  p.out = rows_view(out);
  kernels().norm_fwd(p, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(Tensor x, OptionalTensor residual,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    OptionalTensor seed, int64_t norm, double eps,
                                                    double dropout_p, bool save_sum) {
  NormParams p = forward_params("norm_fwd", x, residual, weight, bias, seed, norm, eps, dropout_p);
  const bool rms = p.norm == NormKind::kRms;
  const int32_t type = scalar_type(x), float32 = aoti_torch_dtype_float32();
  Tensor out = empty_rows(x, p.channels, type);
  Tensor sum = save_sum ? empty_rows(x, p.channels, type) : nothing(type);
  Tensor mean = rms ? nothing(float32) : empty({p.rows}, float32);
  Tensor rstd = empty({p.rows}, float32);
  p.out = rows_view(out);
  p.sum = rows_view_or_none(sum, save_sum);
  p.mean = rms ? nullptr : mutable_data<float>(mean);
  p.rstd = mutable_data<float>(rstd);
  kernels().norm_fwd(p, torch_threads());
  return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_bwd(Tensor grad_out, OptionalTensor grad_sum,
                                                    Tensor sum, Tensor mean, Tensor rstd,
                                                    OptionalTensor weight, OptionalTensor seed,
                                                    int64_t norm, double dropout_p, bool has_weight,
                                                    bool has_bias) {
  const bool rms = kind("norm_bwd", norm) == NormKind::kRms;
  STD_TORCH_CHECK(!(rms && has_bias), "norm_bwd: RMS norm has no bias");
  STD_TORCH_CHECK(sum.dim() >= 1, "norm_bwd: sum must have at least one dimension");
  STD_TORCH_CHECK(dtype(sum) != DType::kBool, "norm_bwd: sum must be a floating tensor");
  const int64_t rows = row_count(sum), channels = sum.size(sum.dim() - 1);
  check_rows("norm_bwd", "grad_out", grad_out, sum);
  if (grad_sum) check_rows("norm_bwd", "grad_sum", *grad_sum, sum);
  if (!rms) check_statistic("mean", mean, rows);
  check_statistic("rstd", rstd, rows);
  weight = parameter("norm_bwd", "weight", weight, sum);

  const int32_t type = scalar_type(sum), float32 = aoti_torch_dtype_float32();
  const bool has_dx = dropout_p != 0.0;
  Tensor dresidual = empty_rows(sum, channels, type);
  Tensor dx = has_dx ? empty_rows(sum, channels, type) : nothing(type);
  Tensor dweight = has_weight ? empty({channels}, float32) : nothing(float32);
  Tensor dbias = has_bias ? empty({channels}, float32) : nothing(float32);

  NormGradParams p;
  p.norm = kind("norm_bwd", norm);
  p.dtype = dtype(sum);
  p.weight_dtype = dtype_or(weight, p.dtype);
  p.rows = rows;
  p.channels = channels;
  p.grad_out = rows_view(grad_out);
  p.grad_sum = rows_view(grad_sum);
  p.sum = rows_view(sum);
  p.mean = rms ? nullptr : mutable_data<float>(mean);
  p.rstd = mutable_data<float>(rstd);
  p.weight = data(weight);
  p.dresidual = rows_view(dresidual);
  p.dx = rows_view_or_none(dx, has_dx);
  p.dweight = has_weight ? mutable_data<float>(dweight) : nullptr;
  p.dbias = has_bias ? mutable_data<float>(dbias) : nullptr;
  p.dropout = dropout(dropout_p, seed);
  kernels().norm_bwd(p, torch_threads());
  return {dresidual, dx, dweight, dbias};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("norm", TORCH_BOX(&ft::bind::norm));
  m.impl("norm_fwd", TORCH_BOX(&ft::bind::norm_fwd));
  m.impl("norm_bwd", TORCH_BOX(&ft::bind::norm_bwd));
}
