// cross_entropy and linear_cross_entropy: tensors in, params structs out. Their schemas are in
// library.cpp.
#include "../common/loss.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "linear.h"

namespace ft::bind {
namespace {

LossOptions options(const char* op, int64_t ignore_index, double label_smoothing, double z_loss,
                    int64_t reduction) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= static_cast<int64_t>(Reduction::kSum), op,
                  ": unknown reduction");
  return {ignore_index, static_cast<float>(label_smoothing), static_cast<float>(z_loss),
          static_cast<Reduction>(reduction)};
}

// One int64 for each row of x, contiguous, ignore_index or a class.
Tensor checked_target(const char* op, const Tensor& target, const Tensor& x, int64_t classes,
                      int64_t ignore_index) {
  bool same = target.dim() == x.dim() - 1;
  for (int64_t i = 0; same && i < target.dim(); ++i) same = target.size(i) == x.size(i);
  STD_TORCH_CHECK(same && scalar_type(target) == aoti_torch_dtype_int64(), op,
                  ": target must hold one int64 for each row");
  Tensor flat = target.is_contiguous() ? target : torch::stable::contiguous(target);
  const auto* values = static_cast<const int64_t*>(flat.const_data_ptr());
  for (int64_t r = 0; r < flat.numel(); ++r) {
    STD_TORCH_CHECK(values[r] == ignore_index || (values[r] >= 0 && values[r] < classes), op,
                    ": target has ", values[r], ", which is neither ignore_index ", ignore_index,
                    " nor one of ", classes, " classes");
  }
  return flat;
}
const int64_t* classes_of_rows(const Tensor& target) {
  return static_cast<const int64_t*>(target.const_data_ptr());
}

// A float32 for each row, or one.
Tensor empty_loss(const Tensor& target, const LossOptions& o) {
  const int32_t type = aoti_torch_dtype_float32();
  if (o.reduction != Reduction::kNone || target.dim() == 0) return empty({}, type);
  return empty_rows(target, target.size(target.dim() - 1), type);
}
Tensor checked_grad(const char* op, const Tensor& grad, const Tensor& target,
                    const LossOptions& o) {
  const int64_t wanted = o.reduction == Reduction::kNone ? target.numel() : 1;
  STD_TORCH_CHECK(dtype(grad) == DType::kFloat32 && grad.numel() == wanted, op,
                  ": grad_loss must be float32 of loss's shape");
  return grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
}
const RowStatistics* checked_statistics(const char* op, const Tensor& t, const Tensor& target) {
  STD_TORCH_CHECK(
      dtype(t) == DType::kFloat32 && t.numel() == 2 * target.numel() && t.is_contiguous(), op,
      ": statistics must hold two float32 for each row");
  return static_cast<const RowStatistics*>(t.const_data_ptr());
}
RowStatistics* as_statistics(const Tensor& t) {
  return static_cast<RowStatistics*>(t.mutable_data_ptr());
}

// A large tensor is fresh memory at every call, and its page faults cost more than what is computed
// into it: 50 MB took 20 ms to write first, and 8 ms in large pages (Linux 6.18, Xeon).
Tensor in_large_pages(Tensor t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const auto end = begin + static_cast<size_t>(t.numel()) * t.element_size();
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = end / kLargePage * kLargePage;
  // advice alone: where the system cannot follow it, nothing changes
  if (last >= first + 2 * kLargePage) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return t;
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(Tensor logits, Tensor target, int64_t ignore_index,
                                             double label_smoothing, double z_loss,
                                             int64_t reduction) {
  constexpr auto kOp = "cross_entropy_fwd";
  CrossEntropyParams p;
  p.dtype = checked_dtype(kOp, logits, "logits");
  p.rows = row_count(logits);
  p.classes = features(logits);
  p.options = options(kOp, ignore_index, label_smoothing, z_loss, reduction);
  target = checked_target(kOp, target, logits, p.classes, ignore_index);
  Tensor loss = empty_loss(target, p.options);
  Tensor statistics = empty({p.rows, 2}, aoti_torch_dtype_float32());
  p.logits = rows_view(logits);
  p.target = classes_of_rows(target);
  p.loss = mutable_data<float>(loss);
  p.statistics = as_statistics(statistics);
  kernels().cross_entropy_fwd(p, torch_threads());
  return {loss, statistics};
}

Tensor cross_entropy_bwd(Tensor grad_loss, Tensor logits, Tensor target, Tensor statistics,
                         int64_t ignore_index, double label_smoothing, double z_loss,
                         int64_t reduction) {
  constexpr auto kOp = "cross_entropy_bwd";
  CrossEntropyGradParams p;
  p.dtype = checked_dtype(kOp, logits, "logits");
  p.rows = row_count(logits);
  p.classes = features(logits);
  p.options = options(kOp, ignore_index, label_smoothing, z_loss, reduction);
  target = checked_target(kOp, target, logits, p.classes, ignore_index);
  grad_loss = checked_grad(kOp, grad_loss, target, p.options);
  Tensor dlogits = in_large_pages(empty_rows(logits, p.classes, scalar_type(logits)));
  p.logits = rows_view(logits);
  p.target = classes_of_rows(target);
  p.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  p.statistics = checked_statistics(kOp, statistics, target);
  p.dlogits = rows_view(dlogits);
  kernels().cross_entropy_bwd(p, torch_threads());
  return dlogits;
}

// What forward and backward are told alike; the tensors, of which the last two are made contiguous
// here, must live as long as `p`.
template <typename Params>
void set_inputs(const char* op, Params& p, const Tensor& hidden, const Tensor& weight,
                OptionalTensor& b, Tensor& target, int64_t ignore_index) {
  p.dtype = checked_dtype(op, hidden, "hidden");
  p.rows = row_count(hidden);
  p.channels = features(hidden);
  check_weight(op, "weight", weight, p.channels, hidden);
  b = bias(op, "bias", b, weight.size(0), hidden);
  target = checked_target(op, target, hidden, weight.size(0), ignore_index);
  p.classes = weight.size(0);
  p.hidden = rows_view(hidden);
  p.weight = rows_view(weight);
  p.bias = data(b);
  p.target = classes_of_rows(target);
}

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(Tensor hidden, Tensor weight, OptionalTensor b,
                                                    Tensor target, int64_t ignore_index,
                                                    double label_smoothing, double z_loss,
                                                    int64_t reduction) {
  constexpr auto kOp = "linear_cross_entropy_fwd";
  LinearCrossEntropyParams p;
  set_inputs(kOp, p, hidden, weight, b, target, ignore_index);
  p.options = options(kOp, ignore_index, label_smoothing, z_loss, reduction);
  Tensor loss = empty_loss(target, p.options);
  Tensor statistics = empty({p.rows, 2}, aoti_torch_dtype_float32());
  p.loss = mutable_data<float>(loss);
  p.statistics = as_statistics(statistics);
  kernels().linear_cross_entropy_fwd(p, torch_threads());
  return {loss, statistics};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(
    Tensor grad_loss, Tensor hidden, Tensor weight, OptionalTensor b, Tensor target,
    Tensor statistics, int64_t ignore_index, double label_smoothing, double z_loss,
    int64_t reduction, bool need_dhidden, bool need_dweight, bool need_dbias) {
  constexpr auto kOp = "linear_cross_entropy_bwd";
  LinearCrossEntropyGradParams p;
  set_inputs(kOp, p, hidden, weight, b, target, ignore_index);
  p.options = options(kOp, ignore_index, label_smoothing, z_loss, reduction);
  grad_loss = checked_grad(kOp, grad_loss, target, p.options);
  p.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  p.statistics = checked_statistics(kOp, statistics, target);
  Tensor dhidden = in_large_pages(gradient_of(hidden, need_dhidden));
  Tensor dweight = in_large_pages(gradient_of(weight, need_dweight));
  Tensor dbias = gradient_of_bias(weight, need_dbias);
  p.dhidden = rows_view_or_none(dhidden, need_dhidden);
  p.dweight = rows_view_or_none(dweight, need_dweight);
  p.dbias = data_or_none(dbias, need_dbias);
  kernels().linear_cross_entropy_bwd(p, torch_threads());
  return {dhidden, dweight, dbias};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&ft::bind::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&ft::bind::cross_entropy_bwd));
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&ft::bind::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&ft::bind::linear_cross_entropy_bwd));
}
