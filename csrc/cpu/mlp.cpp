// y = dropout(act(x W1ᵀ + b1)) W2ᵀ + b2 and its gradients. 2 M F (K + N) FLOPs forward, twice that
// backward, which makes the hidden activation again from the pre-activation: the saved one, or one
// made again too, for 2 M F K more.
// Rows are taken in chunks whose hidden matrix stays in cache between the two products.
#include "hidden.h"

namespace ft::FT_ISA {
namespace {

template <typename T>
void forward(const MlpParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const Hidden<T> kept(p.m, p.f, kForwardBytes);
  const int64_t chunks = ceil_div(p.m, kept.most);
  const Packed<D> w1(parallel, transpose_of<D, T>(p.w1), p.f, p.k, kept.most, chunks);
  const Packed<D> w2(parallel, transpose_of<D, T>(p.w2), p.n, p.f, kept.most, chunks);
  two_layers<T>(p, parallel, kept, *w1, *w2);
}

template <typename T>
void backward(const MlpGradParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const bool deeper = p.dx || p.dw1 || p.db1;
  const bool remakes = !p.pre && (deeper || p.dw2);
  const Hidden<T> kept(p.m, p.f, kBackwardBytes);
  const Remade<T> remade(kept, remakes);
  Scratch scratch((deeper ? kept.bytes() : 0) + (p.dw2 ? kept.bytes() : 0) + remade.bytes());
  const RowsView dpre = deeper ? kept.take(scratch) : RowsView{};
  const RowsView hidden = p.dw2 ? kept.take(scratch) : RowsView{};
  const RowsView made = remade.take(scratch);
  const Packed<D> w1(parallel, transpose_of<D, T>(p.w1), p.f, p.k, kept.most,
                     remakes ? ceil_div(p.m, kept.most) : 0);
  WeightGradient<T> dw1(p.dw1, p.f, p.k, p.m <= kept.most), dw2(p.dw2, p.n, p.f, p.m <= kept.most);
  BiasGradient<T> db1(p.db1, p.f), db2(p.db2, p.n);
  for_chunks<D>(p.m, kept.most, [&](int64_t begin, int64_t rows) {
    const bool first = begin == 0, last = begin + rows == p.m;
    const RowsView dy = rows_from<T>(p.grad_out, begin), x = rows_from<T>(p.x, begin);
    const RowsView pre = remakes ? made : rows_from<T>(p.pre, begin);
    if (remakes) {
      matmul(parallel, {rows, p.f, p.k, p.m}, rows_along_k<D, T>(x, p.k), *w1,
             Activated<T, T>{Activation::kIdentity, static_cast<const T*>(p.b1), {}, pre, {}, 0});
    }
    const HiddenGradient<T> gradient{p.activation, pre, dpre, hidden, p.dropout, begin};
    if (deeper) {
      matmul(parallel, {rows, p.f, p.n}, rows_along_k<D, T>(dy, p.n), itself<D, T>(p.w2), gradient);
    } else if (hidden) {
      for_tiles<T>(parallel, rows, p.f, gradient);
    }
    dw2.template add<T, Kept<T>>(parallel, dy, hidden, rows, first, last);
    db2.template add<T>(parallel, dy, rows, first, last);
    dw1.template add<Kept<T>, T>(parallel, dpre, x, rows, first, last);
    db1.template add<Kept<T>>(parallel, dpre, rows, first, last);
    if (p.dx) {
      matmul(parallel, {rows, p.k, p.f}, rows_along_k<D, Kept<T>>(dpre, p.f), itself<D, T>(p.w1),
             Stored<T>{rows_from<T>(p.dx, begin)});
    }
  });
}

}  // namespace

void mlp_fwd(const MlpParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { forward<decltype(element)>(p, parallel); });
}
void mlp_bwd(const MlpGradParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { backward<decltype(element)>(p, parallel); });
}

}  // namespace ft::FT_ISA
