// y = (act(x Wgᵀ) ∘ (x Wuᵀ)) Wdᵀ and its gradients: Shazeer, "GLU variants improve Transformer",
// 2020. 2 M F (2K + N) FLOPs forward, twice that backward. Half a panel of either first weight
// makes a tile of both products, so that the gate meets what it gates while both are in L1; rows
// are taken in chunks whose hidden matrix stays in cache, as in mlp.cpp.
#include "../common/gated_mlp.h"

#include "gradients.h"
#include "hidden.h"
#include "weights.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kHalf = kTileCols / 2;

// Features of a tile of both products.
struct Half {
  int64_t col, cols;
  Half(const Tile& t, int64_t features)
      : col(t.col / 2), cols(std::min(kHalf, features - t.col / 2)) {}
};

// A row of half a tile, as store_row.
template <typename T>
FT_INLINE void store_half(T* to, int64_t cols, const Vec (&v)[kTileVecs / 2]) {
  if (kTileVecs == 4 && cols == kHalf) return store_pair(to, v[0], v[kTileVecs / 2 - 1]);
  for (int64_t i = 0; i < kTileVecs / 2 && i * kWidth < cols; ++i) {
    store(to + i * kWidth, v[i], cols - i * kWidth);
  }
}

// What a tile holds with the biases: gate and up, each where it is asked for.
template <typename T>
struct Biased {
  const T *gate, *up;

  FT_INLINE Vec add(const T* bias, Vec v, int64_t at, int64_t left) const {
    return bias ? v + load(bias + at, left) : v;
  }
};

// out = act(gate) ∘ up; gate and up themselves where they are asked for.
template <typename T, typename Out>
struct Gated {
  Activation activation;
  int64_t features;
  Biased<T> bias;
  RowsView gate, up;  // of T
  RowsView out;       // of Out; may be absent

  void operator()(const Tile& t) const {
    with_activation(activation, [&](auto kind) { run<kind()>(t); });
  }

 private:
  template <Activation kActivation>
  void run(const Tile tile) const {
    const Half half(tile, features);
    const Biased<T> b = bias;
    const bool keeps{gate}, makes{out};
    T* to_gate = keeps ? mutable_row<T>(gate, tile.row) + half.col : nullptr;
    T* to_up = keeps ? mutable_row<T>(up, tile.row) + half.col : nullptr;
    Out* to = makes ? mutable_row<Out>(out, tile.row) + half.col : nullptr;
    const int64_t gate_stride = gate.stride[0], up_stride = up.stride[0], stride = out.stride[0];
    const float* c = tile.c;
    for (int64_t r = 0; r < tile.rows; ++r, c += tile.ldc) {
      Vec g[kTileVecs / 2], u[kTileVecs / 2], h[kTileVecs / 2];
#pragma GCC unroll 2
      for (int i = 0; i < kTileVecs / 2; ++i) {
        const int64_t j = i * kWidth, at = half.col + j, left = std::max<int64_t>(0, half.cols - j);
        g[i] = b.add(b.gate, load(c + j), at, left);
        u[i] = b.add(b.up, load(c + kHalf + j), at, left);
        h[i] = activate<kActivation, T>(g[i]) * u[i];
      }
      if (keeps) {
        store_half(to_gate + r * gate_stride, half.cols, g);
        store_half(to_up + r * up_stride, half.cols, u);
      }
      if (makes) store_half(to + r * stride, half.cols, h);
    }
  }
};

// C is the gradient of h = act(gate) ∘ up: those of gate and up, and h once more. They may be
// absent, the first two together; without them, C is not read.
template <typename T>
struct GatedGradient {
  Activation activation;
  RowsView gate, up;       // of T
  RowsView dgate, dup, h;  // of Kept<T>

  void operator()(const Tile& t) const {
    with_activation(activation, [&](auto kind) { run<kind()>(t); });
  }

 private:
  template <Activation kActivation>
  void run(const Tile tile) const {
    const bool has_h{h}, deeper{dgate};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* from_gate = row<T>(gate, tile.row + r) + tile.col;
      const T* from_up = row<T>(up, tile.row + r) + tile.col;
      Kept<T>* to_h = has_h ? mutable_row<Kept<T>>(h, tile.row + r) + tile.col : nullptr;
      Kept<T>* to_gate = deeper ? mutable_row<Kept<T>>(dgate, tile.row + r) + tile.col : nullptr;
      Kept<T>* to_up = deeper ? mutable_row<Kept<T>>(dup, tile.row + r) + tile.col : nullptr;
      for (int64_t j = 0; j < tile.cols; j += kWidth) {
        const int64_t left = tile.cols - j;
        const Vec g = load(from_gate + j, left), u = load(from_up + j, left);
        const auto [a, slope] = activation_and_slope<kActivation, T>(g);
        if (has_h) store(to_h + j, a * u, left);
        if (deeper) {
          const Vec c = load(tile.c + r * tile.ldc + j);
          store(to_up + j, c * a, left);
          store(to_gate + j, c * u * slope, left);
        }
      }
    }
  }
};

template <typename T, typename Params>
PairedWeights<T> gate_and_up(const Params& p) {
  return {{p.w_gate, p.w_up}, p.f};
}
template <typename T, typename Params>
Biased<T> biases(const Params& p) {
  return {static_cast<const T*>(p.b_gate), static_cast<const T*>(p.b_up)};
}

template <typename T>
void forward(const GatedMlpParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const Hidden<T> kept(p.m, p.f, kForwardBytes);
  Scratch scratch(kept.bytes());
  const RowsView hidden = kept.take(scratch);
  const int64_t chunks = ceil_div(p.m, kept.most);
  const auto pair = gate_and_up<T>(p);
  const Packed<D> first(parallel, columns_of<D, T>(pair), pair.columns(), p.k, kept.most, chunks);
  const Packed<D> second(parallel, columns_along_k<D, T>(p.w_down), p.n, p.f, kept.most, chunks);
  for_chunks<D>(p.m, kept.most, [&](int64_t begin, int64_t rows) {
    matmul(parallel, {rows, pair.columns(), p.k, p.m},
           rows_along_k<D, T>(rows_from<T>(p.x, begin), p.k), *first,
           Gated<T, Kept<T>>{p.activation, p.f, biases<T>(p), rows_from<T>(p.gate, begin),
                             rows_from<T>(p.up, begin), hidden});
    matmul(parallel, {rows, p.n, p.f, p.m}, rows_along_k<D, Kept<T>>(hidden, p.f), *second,
           Activated<T, T>{Activation::kIdentity,
                           static_cast<const T*>(p.b_down),
                           {},
                           rows_from<T>(p.y, begin),
                           {},
                           0});
  });
}

template <typename T>
void backward(const GatedMlpGradParams& p, const Parallel& parallel) {
  using D = Dot<T>;
  const bool deeper = p.dx || p.dw_gate || p.dw_up || p.db_gate || p.db_up;
  const bool remakes = !p.gate && (deeper || p.dw_down);
  const Hidden<T> kept(p.m, p.f, kBackwardBytes);
  const Remade<T> remade(kept, remakes);
  Scratch scratch((deeper ? 2 * kept.bytes() : 0) + (p.dw_down ? kept.bytes() : 0) +
                  2 * remade.bytes());
  const RowsView dgate = deeper ? kept.take(scratch) : RowsView{};
  const RowsView dup = deeper ? kept.take(scratch) : RowsView{};
  const RowsView hidden = p.dw_down ? kept.take(scratch) : RowsView{};
  const RowsView made_gate = remade.take(scratch), made_up = remade.take(scratch);
  const bool one_chunk = p.m <= kept.most;
  const int64_t chunks = ceil_div(p.m, kept.most);
  const auto pair = gate_and_up<T>(p);
  const Packed<D> first(parallel, columns_of<D, T>(pair), pair.columns(), p.k, kept.most,
                        remakes ? chunks : 0);
  WeightGradient<T> dw_gate(MatrixView{p.dw_gate}, p.f, p.k, one_chunk),
      dw_up(MatrixView{p.dw_up}, p.f, p.k, one_chunk);
  WeightGradient<T> dw_down(MatrixView{p.dw_down}, p.n, p.f, one_chunk);
  BiasGradient<T> db_gate(p.db_gate, p.f), db_up(p.db_up, p.f), db_down(p.db_down, p.n);
  for_chunks<D>(p.m, kept.most, [&](int64_t begin, int64_t rows) {
    const bool is_first = begin == 0, last = begin + rows == p.m;
    const RowsView dy = rows_from<T>(p.grad_out, begin), x = rows_from<T>(p.x, begin);
    const RowsView gate = remakes ? made_gate : rows_from<T>(p.gate, begin);
    const RowsView up = remakes ? made_up : rows_from<T>(p.up, begin);
    if (remakes) {
      matmul(parallel, {rows, pair.columns(), p.k, p.m}, rows_along_k<D, T>(x, p.k), *first,
             Gated<T, T>{Activation::kIdentity, p.f, biases<T>(p), gate, up, {}});
    }
    const GatedGradient<T> gradient{p.activation, gate, up, dgate, dup, hidden};
    if (deeper) {
      matmul(parallel, {rows, p.f, p.n}, rows_along_k<D, T>(dy, p.n),
             columns_along_n<D, T>(p.w_down), gradient);
    } else if (hidden) {
      for_tiles<T>(parallel, rows, p.f, gradient);
    }
    dw_down.template add<T, Kept<T>>(parallel, dy, hidden, rows, is_first, last);
    db_down.template add<T>(parallel, dy, rows, is_first, last);
    const Packed<D> packed_x(parallel, columns_along_n<D, T>(x), p.k, rows, p.f,
                             p.dw_gate && p.dw_up ? 2 : 0);
    dw_gate.template add<Kept<T>>(parallel, dgate, *packed_x, rows, is_first, last);
    dw_up.template add<Kept<T>>(parallel, dup, *packed_x, rows, is_first, last);
    db_gate.template add<Kept<T>>(parallel, dgate, rows, is_first, last);
    db_up.template add<Kept<T>>(parallel, dup, rows, is_first, last);
    if (p.dx) {
      const Product<D> sum[] = {
          {rows_along_k<D, Kept<T>>(dgate, p.f), columns_along_n<D, T>(p.w_gate), p.f},
          {rows_along_k<D, Kept<T>>(dup, p.f), columns_along_n<D, T>(p.w_up), p.f}};
      matmul<D>(parallel, {rows, p.k, p.f}, sum, Stored<T>{rows_from<T>(p.dx, begin)});
    }
  });
}

}  // namespace

void gated_mlp_fwd(const GatedMlpParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { forward<decltype(element)>(p, parallel); });
}
void gated_mlp_bwd(const GatedMlpGradParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto element) { backward<decltype(element)>(p, parallel); });
}

}  // namespace ft::FT_ISA
