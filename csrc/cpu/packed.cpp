// linear_act and mlp on weights that were prepared once: as the panels that the product streams, or
// as int8 with a scale for each output. Packing costs a call about as much as reading the weight,
// which is what few rows are bound by; int8 reads a quarter of the bytes of float. 2 M N K FLOPs.
#include "../common/packed.h"

#include "hidden.h"

namespace ft::FT_ISA {
namespace {

template <typename T>
Right<Dot<T>> columns_of(const PackedWeight& w) {
  using D = Dot<T>;
  if (w.scale) return columns_along_k<D, int8_t>(w.rows);
  Right<D> b{};
  b.panels = static_cast<const typename D::Lane*>(w.panels);
  return b;
}

template <typename T>
void linear(const PackedLinearParams& packed, const Parallel& parallel) {
  using D = Dot<T>;
  const LinearParams& p = packed.layer;
  matmul(parallel, {p.m, p.n, p.k}, rows_along_k<D, T>(p.x, p.k), columns_of<T>(packed.weight),
         Activated<T, T>{
             p.activation, static_cast<const T*>(p.bias), {}, p.y, {}, 0, packed.weight.scale});
}

}  // namespace

int64_t packed_bytes(DType dtype, int64_t n, int64_t k) {
  int64_t bytes = 0;
  with_storage(dtype, [&](auto element) {
    using D = Dot<decltype(element)>;
    bytes = panels(n) * panel_size<D>(k) * static_cast<int64_t>(sizeof(typename D::Lane));
  });
  return bytes;
}
void pack_weight(DType dtype, int64_t n, int64_t k, const RowsView& weight, void* to,
                 const Parallel& parallel) {
  with_storage(dtype, [&](auto element) {
    using T = decltype(element);
    using D = Dot<T>;
    pack_panels(parallel, columns_along_k<D, T>(weight), 0, n, k,
                static_cast<typename D::Lane*>(to), panel_size<D>(k));
  });
}
void packed_linear(const PackedLinearParams& p, const Parallel& parallel) {
  with_storage(p.layer.dtype, [&](auto element) { linear<decltype(element)>(p, parallel); });
}
void packed_mlp(const PackedMlpParams& p, const Parallel& parallel) {
  with_storage(p.layers.dtype, [&](auto element) {
    using T = decltype(element);
    two_layers<T>(p.layers, parallel, Hidden<T>(p.layers.m, p.layers.f, kForwardBytes),
                  columns_of<T>(p.w1), columns_of<T>(p.w2), p.w1.scale, p.w2.scale);
  });
}

}  // namespace ft::FT_ISA
