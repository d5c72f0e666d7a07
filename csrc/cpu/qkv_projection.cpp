// query, key, value = x Wqᵀ + bq, x Wkᵀ + bk, x Wvᵀ + bv in one product, and its gradients.
// 2 M K (Nq + Nk + Nv) FLOPs forward, twice that backward; dx is one sum over the three.
#include "../common/qkv_projection.h"

#include "gradients.h"
#include "weights.h"

namespace ft::FT_ISA {
namespace {

template <typename T>
struct Projected {
  const JoinedWeights<T>& weights;
  const void* const* bias;
  const RowsView* out;

  void operator()(const Tile& tile) const {
    const auto [i, column, count] = weights.place(tile.col);
    const Activated<T, T> one{
        Activation::kIdentity, static_cast<const T*>(bias[i]), {}, out[i], {}, 0};
    one({tile.row, tile.rows, column, count, tile.c, tile.ldc});
  }
};

template <typename T>
void forward(const QkvProjectionParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const JoinedWeights<T> weights{{p.weight[0], p.weight[1], p.weight[2]}, {p.n[0], p.n[1], p.n[2]}};
  matmul(parallel, {p.m, weights.columns(), p.k}, rows_along_k<D, T>(p.x, p.k),
         columns_of<D, T>(weights), Projected<T>{weights, p.bias, p.out});
}

template <typename T>
void backward(const QkvProjectionGradParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  int wanted = 0;
  int64_t most = 0;
  for (int i = 0; i < 3; ++i) {
    if (!p.dw[i]) continue;
    ++wanted;
    most = std::max(most, p.n[i]);
  }
  const Packed<D> x(parallel, columns_along_n<D, T>(p.x), p.k, p.m, most, wanted);
  for (int i = 0; i < 3; ++i) {
    WeightGradient<T> dw(MatrixView{p.dw[i]}, p.n[i], p.k, true);
    dw.template add<T>(parallel, p.grad_out[i], *x, p.m, true, true);
    BiasGradient<T> db(p.db[i], p.n[i]);
    db.template add<T>(parallel, p.grad_out[i], p.m, true, true);
  }
  if (!p.dx) return;
  const auto product = [&](int i) {
    return Product<D>{rows_along_k<D, T>(p.grad_out[i], p.n[i]), columns_along_n<D, T>(p.weight[i]),
                      p.n[i]};
  };
  const Product<D> sum[] = {product(0), product(1), product(2)};
  matmul<D>(parallel, {p.m, p.k, 0}, sum, Stored<T>{p.dx});
}

}  // namespace

void qkv_projection_fwd(const QkvProjectionParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { forward<decltype(element)>(p, parallel); });
}
void qkv_projection_bwd(const QkvProjectionGradParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { backward<decltype(element)>(p, parallel); });
}

}  // namespace ft::FT_ISA
