// Plain data that every kernel's parameters are made of; shared by CPU and CUDA, free of torch.
#pragma once
#include <cstdint>

namespace ft {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kBool };

// Storage formats. Arithmetic never happens in them: they are loaded as float and stored from
// float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// A tensor as a kernel sees it: an address and strides in elements, outermost dimension first.
// The last dimension is contiguous, so it has no stride.
template <int kOuterDims>
struct View {
  const void* data = nullptr;
  int64_t stride[kOuterDims] = {};

  explicit operator bool() const { return data != nullptr; }
};
using HeadsView = View<3>;  // (batch, heads, length, head_dim)
using RowsView = View<1>;   // (rows, channels)

// A matrix that may lie in memory either way round. Transposed, its columns are what is contiguous,
// and its stride is that from one of them to the next.
struct MatrixView : RowsView {
  bool transposed = false;
};

// Row addresses are computed in 64 bits: a tensor may hold more than 2^31 elements.
template <typename T>
const T* row(const HeadsView& v, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(v.data) + b * v.stride[0] + h * v.stride[1] + t * v.stride[2];
}
template <typename T>
T* mutable_row(const HeadsView& v, int64_t b, int64_t h, int64_t t) {
  return const_cast<T*>(row<T>(v, b, h, t));
}
template <typename T>
const T* row(const RowsView& v, int64_t r) {
  return static_cast<const T*>(v.data) + r * v.stride[0];
}
template <typename T>
T* mutable_row(const RowsView& v, int64_t r) {
  return const_cast<T*>(row<T>(v, r));
}

}  // namespace ft
