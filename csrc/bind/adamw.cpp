// adamw_, sum_of_squares: lists of tensors in, runs of elements out. Schemas are in library.cpp.
// Everything is looked at before anything is changed: a call that raises has done nothing.
#include "../common/adamw.h"

#include <cmath>
#include <vector>

#include "tensor.h"

namespace ft::bind {
namespace {

using Handles = std::vector<AtenTensorHandle>;

// A list of tensors as the boxed call hands it over: it owns them. Plain handles, since hundreds of
// stable::Tensor would cost an allocation and atomic counts each.
class Tensors {
 public:
  explicit Tensors(Handles handles) : handles_(std::move(handles)) {}
  ~Tensors() {
    for (AtenTensorHandle t : handles_) aoti_torch_delete_tensor_object(t);
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  size_t size() const { return handles_.size(); }
  bool empty() const { return handles_.empty(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  Handles handles_;
};

int64_t numel(AtenTensorHandle t) {
  int64_t count;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(t, &count));
  return count;
}
int32_t scalar_type(AtenTensorHandle t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &type));
  return type;
}
// Where the elements are; raises where there are any, but no memory.
void* memory(const char* op, AtenTensorHandle t, int64_t count) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &data));
  STD_TORCH_CHECK(count == 0 || data != nullptr, op, ": a tensor has no memory");
  return data;
}

// Sizes and strides of a tensor, as its owner keeps them.
struct Layout {
  explicit Layout(AtenTensorHandle t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
  }
  bool operator==(const Layout& other) const {
    if (dims != other.dims) return false;
    for (int64_t d = 0; d < dims; ++d) {
      if (sizes[d] != other.sizes[d]) return false;
      if (strides[d] != other.strides[d] && sizes[d] > 1) return false;
    }
    return true;
  }
  // Whether the elements fill a stretch of memory, each with a place of its own.
  bool dense() const {
    int64_t expected = 1, left = 0;
    bool contiguous = true;
    for (int64_t d = dims - 1; d >= 0; --d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] == 1) continue;
      contiguous = contiguous && strides[d] == expected;
      expected *= sizes[d];
      ++left;
    }
    if (contiguous) return true;
    for (expected = 1; left > 0; --left) {  // the dimension that goes on where others end
      int64_t d = 0;
      while (d < dims && (sizes[d] == 1 || strides[d] != expected)) ++d;
      if (d == dims) return false;
      expected *= sizes[d];
    }
    return true;
  }

  int64_t dims;
  int64_t *sizes, *strides;
};

DType element_type(const char* op, AtenTensorHandle t) {
  const DType type = dtype(scalar_type(t));
  STD_TORCH_CHECK(type != DType::kBool, op, ": tensors must be of a floating dtype");
  return type;
}

Tensor sum_of_squares(Handles tensor_handles) {
  const Tensors tensors(std::move(tensor_handles));
  std::vector<GradientRun> runs(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const AtenTensorHandle t = tensors[i];
    STD_TORCH_CHECK(Layout(t).dense(), "sum_of_squares: tensor ", i, " is not dense");
    const int64_t count = numel(t);
    runs[i] = {memory("sum_of_squares", t, count), element_type("sum_of_squares", t), count};
  }
  Tensor total = empty({}, aoti_torch_dtype_float64());
  *mutable_data<double>(total) =
      kernels().sum_of_squares({runs.data(), static_cast<int64_t>(runs.size())}, torch_threads());
  return total;
}

// A counter of steps: 0-d, float32, or float64 where that is torch's default dtype.
class StepCounter {
 public:
  explicit StepCounter(AtenTensorHandle t) : data_(memory("adamw_", t, 1)) {
    const int32_t type = scalar_type(t);
    is_double_ = type == aoti_torch_dtype_float64();
    STD_TORCH_CHECK(numel(t) == 1 && (is_double_ || type == aoti_torch_dtype_float32()),
                    "adamw_: a step must be one float32 or float64");
  }
  double next() const {
    return is_double_ ? *static_cast<double*>(data_) + 1
                      : static_cast<double>(*static_cast<float*>(data_) + 1);
  }
  void count_up() const {
    is_double_ ? void(*static_cast<double*>(data_) += 1) : void(*static_cast<float*>(data_) += 1);
  }

 private:
  void* data_;
  bool is_double_;
};

void adamw_(Handles param_handles, Handles grad_handles, Handles exp_avg_handles,
            Handles exp_avg_sq_handles, Handles max_exp_avg_sq_handles, Handles step_handles,
            double lr, double beta1, double beta2, double weight_decay, double eps,
            double grad_scale) {
  const Tensors params(std::move(param_handles)), grads(std::move(grad_handles));
  const Tensors exp_avgs(std::move(exp_avg_handles)), exp_avg_sqs(std::move(exp_avg_sq_handles));
  const Tensors max_exp_avg_sqs(std::move(max_exp_avg_sq_handles)), steps(std::move(step_handles));
  const size_t count = params.size();
  const bool amsgrad = !max_exp_avg_sqs.empty();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count &&
                      exp_avg_sqs.size() == count && steps.size() == count &&
                      (!amsgrad || max_exp_avg_sqs.size() == count),
                  "adamw_: every parameter needs a gradient, its state and a step");
  std::vector<AdamWRun> runs(count);
  std::vector<StepCounter> counters;
  counters.reserve(count);
  double step = 0, step_size = 0, correction = 0;  // of the last one: most share it
  for (size_t i = 0; i < count; ++i) {
    const AtenTensorHandle param = params[i];
    const Layout layout(param);
    STD_TORCH_CHECK(layout.dense(), "adamw_: parameter ", i, " is not dense");
    const int32_t type = scalar_type(param);
    AdamWRun& run = runs[i];
    run.dtype = element_type("adamw_", param);
    run.count = numel(param);
    const auto part = [&](AtenTensorHandle t) {
      STD_TORCH_CHECK(scalar_type(t) == type && Layout(t) == layout, "adamw_: gradient and state ",
                      i, " must have the parameter's dtype and layout");
      return memory("adamw_", t, run.count);
    };
    run.param = memory("adamw_", param, run.count);
    run.grad = part(grads[i]);
    run.exp_avg = part(exp_avgs[i]);
    run.exp_avg_sq = part(exp_avg_sqs[i]);
    run.max_exp_avg_sq = amsgrad ? part(max_exp_avg_sqs[i]) : nullptr;
    counters.emplace_back(steps[i]);
    if (const double next = counters.back().next(); next != step) {
      step = next;
      step_size = lr / (1 - std::pow(beta1, step));
      correction = 1 / std::sqrt(1 - std::pow(beta2, step));
    }
    run.step_size = static_cast<float>(step_size);
    run.correction = static_cast<float>(correction);
  }
  AdamWParams p;
  p.tensors = runs.data();
  p.tensor_count = static_cast<int64_t>(count);
  p.grad_scale = static_cast<float>(grad_scale);
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.decay = static_cast<float>(lr * weight_decay);
  p.eps = static_cast<float>(eps);
  for (const StepCounter& counter : counters) counter.count_up();
  kernels().adamw(p, torch_threads());
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&ft::bind::adamw_));
  m.impl("sum_of_squares", TORCH_BOX(&ft::bind::sum_of_squares));
}
