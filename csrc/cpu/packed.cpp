// linear_act and mlp on weights that were prepared once: as the panels that the product streams, or
// as int8 with a scale for each output. Packing costs a call about as much as reading the weight,
// which is what few rows are bound by; int8 reads a quarter of the bytes of float. 2 M N K FLOPs.
#include "../common/packed.h"

#include "gradients.h"
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
void linear(const PackedLinearParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  matmul(
      parallel, {p.m, p.n, p.k}, rows_along_k<D, T>(p.x, p.k), columns_of<T>(p.weight),
      Activated<T, T>{p.activation, static_cast<const T*>(p.bias), {}, p.y, {}, 0, p.weight.scale});
}

// Rows are taken in chunks whose hidden matrix stays in cache, as in mlp.cpp.
template <typename T>
void mlp(const PackedMlpParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const Hidden<T> kept(p.m, p.f, kForwardBytes);
  Scratch scratch(kept.bytes());
  const RowsView hidden = kept.take(scratch);
  const T *b1 = static_cast<const T*>(p.b1), *b2 = static_cast<const T*>(p.b2);
  for_chunks<D>(p.m, kept.most, [&](int64_t begin, int64_t rows) {
    matmul(parallel, {rows, p.f, p.k, p.m}, rows_along_k<D, T>(rows_from<T>(p.x, begin), p.k),
           columns_of<T>(p.w1),
           Activated<T, Kept<T>>{p.activation, b1, {}, hidden, {}, 0, p.w1.scale});
    matmul(parallel, {rows, p.n, p.f, p.m}, rows_along_k<D, Kept<T>>(hidden, p.f),
           columns_of<T>(p.w2),
           Activated<T, T>{
               Activation::kIdentity, b2, {}, rows_from<T>(p.y, begin), {}, 0, p.w2.scale});
  });
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
    using Lane = typename D::Lane;
    for_units(parallel, panels(n), [&](Units& units) {
      for (int64_t i; units.next(i);) {
        const int64_t at = i * kTileCols;
        Lane* panel = static_cast<Lane*>(to) + i * panel_size<D>(k);
        if (n - at < kTileCols) std::fill_n(panel, panel_size<D>(k), Lane{});
        pack_transposed<D>(row<T>(weight, at), weight.stride[0],
                           std::min<int64_t>(kTileCols, n - at), k, panel);
      }
    });
  });
}
void packed_linear(const PackedLinearParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { linear<decltype(element)>(p, parallel); });
}
void packed_mlp(const PackedMlpParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { mlp<decltype(element)>(p, parallel); });
}

}  // namespace ft::FT_ISA
