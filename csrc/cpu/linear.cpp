// y = act(x Wᵀ + bias) and its gradients. 2 M N K FLOPs forward, twice that backward; x, W and y
// move once, W once more to be packed.
#include "gradients.h"

namespace ft::FT_ISA {
namespace {

// Rows whose dpre is held at a time in backward.
constexpr int64_t kChunkBytes = int64_t{16} << 20;

template <typename T>
void forward(const LinearParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  matmul(parallel, {p.m, p.n, p.k}, rows_along_k<D, T>(p.x, p.k), transpose_of<D, T>(p.weight),
         Activated<T, T>{p.activation, static_cast<const T*>(p.bias), p.pre, p.y, {}, 0});
}

// dpre = dy act'(pre), elementwise.
template <typename T>
void through_activation(const LinearGradParams& p, const Parallel& parallel, int64_t begin,
                        int64_t rows, const RowsView& dpre) {
  constexpr int64_t kUnitElements = int64_t{1} << 14;
  const int64_t each = std::max<int64_t>(1, kUnitElements / std::max<int64_t>(1, p.n));
  for_units(parallel, ceil_div(rows, each), [&](Units& units) {
    for (int64_t unit; units.next(unit);) {
      const int64_t end = std::min(rows, (unit + 1) * each);
      with_activation(p.activation, [&](auto kind) {
        for (int64_t i = unit * each; i < end; ++i) {
          const T *dy = row<T>(p.grad_out, begin + i), *x = row<T>(p.pre, begin + i);
          Kept<T>* to = mutable_row<Kept<T>>(dpre, i);
          for (int64_t j = 0; j < p.n; j += kWidth) {
            const int64_t left = p.n - j;
            const Vec slope = activation_gradient<kind(), T>(load(x + j, left));
            store(to + j, load(dy + j, left) * slope, left);
          }
        }
      });
    }
  });
}

// Dy: the element type of dpre.
template <typename T, typename Dy>
void gradients_of_chunk(const LinearGradParams& p, const Parallel& parallel, const RowsView& dpre,
                        int64_t begin, int64_t rows, WeightGradient<T>& dw, BiasGradient<T>& db) {
  using D = Dot<T>;
  const bool first = begin == 0, last = begin + rows == p.m;
  if (p.dx) {
    matmul(parallel, {rows, p.k, p.n}, rows_along_k<D, Dy>(dpre, p.n), itself<D, T>(p.weight),
           Stored<T>{rows_from<T>(p.dx, begin)});
  }
  dw.template add<Dy, T>(parallel, dpre, rows_from<T>(p.x, begin), rows, first, last);
  db.template add<Dy>(parallel, dpre, rows, first, last);
}

template <typename T>
void backward(const LinearGradParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  if (p.activation == Activation::kIdentity) {
    WeightGradient<T> dw(p.dw, p.n, p.k, true);
    BiasGradient<T> db(p.db, p.n);
    return gradients_of_chunk<T, T>(p, parallel, p.grad_out, 0, p.m, dw, db);
  }
  const int64_t ld = round_up(p.n, D::kPerLane);
  const int64_t most = std::max<int64_t>(
      D::kTileRows, kChunkBytes / std::max<int64_t>(1, ld * static_cast<int64_t>(sizeof(Kept<T>))));
  const int64_t chunk = std::min(most + D::kTileRows, p.m);
  Scratch scratch(Scratch::bytes<Kept<T>>(chunk * ld));
  const RowsView dpre{scratch.take<Kept<T>>(chunk * ld), {ld}};
  WeightGradient<T> dw(p.dw, p.n, p.k, p.m <= most);
  BiasGradient<T> db(p.db, p.n);
  for_chunks<D>(p.m, most, [&](int64_t begin, int64_t rows) {
    through_activation<T>(p, parallel, begin, rows, dpre);
    gradients_of_chunk<T, Kept<T>>(p, parallel, dpre, begin, rows, dw, db);
  });
}

}  // namespace

void linear_act_fwd(const LinearParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { forward<decltype(element)>(p, parallel); });
}
void linear_act_bwd(const LinearGradParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { backward<decltype(element)>(p, parallel); });
}

}  // namespace ft::FT_ISA
