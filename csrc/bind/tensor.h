// What every binding needs of torch's stable ABI: views of tensors, new tensors, the thread pool.
// Nothing here or beside it includes an ATen header, so one build serves every torch from 2.10 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "../common/parallel.h"
#include "../common/philox.h"
#include "../common/types.h"
#include "../cpu/kernels.h"

namespace ft::bind {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The table of the instruction set in use; raises when none was loaded. Defined in library.cpp.
const Kernels& kernels();

inline int32_t scalar_type(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type;
}
inline DType dtype(int32_t type) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  static const int32_t float16 = aoti_torch_dtype_float16();
  static const int32_t boolean = aoti_torch_dtype_bool();
  STD_TORCH_CHECK(type == float32 || type == bfloat16 || type == float16 || type == boolean,
                  "fast_transformer: the CPU kernels take float32, bfloat16, float16 (and bool for "
                  "masks)");
  return type == float32    ? DType::kFloat32
         : type == bfloat16 ? DType::kBFloat16
         : type == float16  ? DType::kFloat16
                            : DType::kBool;
}
inline DType dtype(const Tensor& t) { return dtype(scalar_type(t)); }

// A tensor that the call makes. `size` gives the shape; `memory_order`, where given, the order of
// dimensions in memory, outermost first ({0, 2, 1, 3}: (B, H, T, D) laid out as (B, T, H, D)).
inline Tensor empty(std::initializer_list<int64_t> size, int32_t type,
                    std::initializer_list<int> memory_order = {}) {
  constexpr int kMaxDims = 8;
  const int dims = static_cast<int>(size.size());
  int64_t stride[kMaxDims], step = 1;
  for (int i = dims - 1; i >= 0; --i) {
    const int d = memory_order.size() ? memory_order.begin()[i] : i;
    stride[d] = step;
    step *= size.begin()[d] > 1 ? size.begin()[d] : 1;
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, size.begin(), stride, type,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
// Contiguous, with the shape of `like` but `last` as its last dimension.
inline Tensor empty_rows(const Tensor& like, int64_t last, int32_t type) {
  constexpr int kMaxDims = 64;
  const int dims = static_cast<int>(like.dim());
  STD_TORCH_CHECK(dims >= 1 && dims <= kMaxDims, "fast_transformer: expected 1 to 64 dimensions");
  int64_t size[kMaxDims], stride[kMaxDims], step = 1;
  for (int i = dims - 1; i >= 0; --i) {
    size[i] = i == dims - 1 ? last : like.size(i);
    stride[i] = step;
    step *= size[i] > 1 ? size[i] : 1;
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size, stride, type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
// Stands for a result that was not asked for.
inline Tensor nothing(int32_t type) { return empty({0}, type); }

inline HeadsView heads_view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "fast_transformer: expected (batch, heads, length, head_dim)");
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1 || t.numel() == 0,
                  "fast_transformer: the last dimension must be contiguous");
  return {t.const_data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}};
}

// (batch, heads, length, dim) of query's dtype.
inline void check_heads(const char* op, const char* name, const Tensor& t, int64_t batch,
                        int64_t heads, int64_t length, int64_t dim, const Tensor& query) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(2) == length &&
                      t.size(3) == dim && scalar_type(t) == scalar_type(query),
                  op, ": ", name, " must be (", batch, ", ", heads, ", ", length, ", ", dim,
                  ") of query's dtype");
}

// The same, as a kernel sees it.
inline HeadsView heads_view(const char* op, const char* name, const Tensor& t, int64_t batch,
                            int64_t heads, int64_t length, int64_t dim, const Tensor& query) {
  check_heads(op, name, t, batch, heads, length, dim, query);
  return heads_view(t);
}

// Slopes, (heads,) or (batch or 1, heads), into the parameters of attention or of decode.
template <typename Params>
void set_alibi(const char* op, Params& p, const OptionalTensor& slopes) {
  if (!slopes) return;
  const int64_t dims = slopes->dim(), rows = dims == 2 ? slopes->size(0) : 1;
  STD_TORCH_CHECK((dims == 1 || dims == 2) && (rows == 1 || rows == p.batch) &&
                      slopes->size(dims - 1) == p.heads && slopes->is_contiguous() &&
                      dtype(*slopes) == DType::kFloat32,
                  op, ": alibi_slopes must be (heads,) or (batch or 1, heads), contiguous float32");
  p.alibi_slopes = static_cast<const float*>(slopes->const_data_ptr());
  p.alibi_stride = rows == 1 ? 0 : p.heads;
}

inline int64_t row_count(const Tensor& t) {
  const int64_t channels = t.size(t.dim() - 1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return channels == 0 ? rows : t.numel() / channels;
}
// (…, channels) as rows that lie one stride apart; raises where they do not.
inline RowsView rows_view(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(last >= 0, "fast_transformer: expected at least one dimension");
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) <= 1 || t.numel() == 0,
                  "fast_transformer: the last dimension must be contiguous");
  int64_t stride = 0, rows = 1;  // of the dimensions seen so far, innermost first
  for (int64_t i = last - 1; i >= 0; --i) {
    const int64_t size = t.size(i);
    if (size == 1) continue;
    if (rows == 1) {
      stride = t.stride(i);
    } else {
      STD_TORCH_CHECK(t.stride(i) == stride * rows || t.numel() == 0,
                      "fast_transformer: rows must lie one stride apart");
    }
    rows *= size;
  }
  return {t.const_data_ptr(), {stride}};
}
inline RowsView rows_view(const OptionalTensor& t) { return t ? rows_view(*t) : RowsView{}; }
// A result that may not have been asked for.
inline RowsView rows_view_or_none(const Tensor& t, bool wanted) {
  return wanted ? rows_view(t) : RowsView{};
}

inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Dropout dropout(double p, const OptionalTensor& seed) {
  if (p == 0.0) return {};
  STD_TORCH_CHECK(p > 0.0 && p <= 1.0, "fast_transformer: dropout_p must lie in [0, 1]");
  STD_TORCH_CHECK(seed && seed->numel() == 1 && scalar_type(*seed) == aoti_torch_dtype_int64(),
                  "fast_transformer: dropout needs a seed, a 0-d int64 tensor");
  return Dropout::with(p,
                       static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())));
}

// torch's own pool, for one call.
inline Parallel torch_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {static_cast<int64_t>(threads),
          [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
          }};
}

}  // namespace ft::bind
