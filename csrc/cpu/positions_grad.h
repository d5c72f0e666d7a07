// The gradients of the relative-position term (positions.h): of position_query and position_key.
//
// A tile of dS, with each row moved right by one more than the row below it, is a matrix over
// positions, zero where a row does not reach. With it both gradients are plain products:
//   dposition_query = scale · shifted · position_key    dposition_key = scale · shiftedᵀ ·
//   position_query
#pragma once
#include "positions.h"

namespace ft::FT_ISA {

// sum (n x dim) += tileᵀ · B, for a tile of `rows` x n whose rows lie `ld` elements apart; `panels`
// hold the `rows` rows of B. `columns` is room for the transposed tile, where lanes are pairs.
template <typename T, typename Element>
void add_transposed(const Element* tile, int64_t ld, int64_t rows, int64_t n,
                    const typename Dot<T>::Lane* panels, int64_t panel, int64_t dim,
                    typename Dot<T>::Lane* columns, float* sum, int64_t sum_ld) {
  using D = Dot<T>;
  const int64_t depth = lanes<D>(rows);
  if constexpr (D::kPerLane > 1) pack_columns<D>(tile, ld, n, rows, columns);
  for (int64_t j = 0; j < n; j += D::kTileRows) {
    LanesA<typename D::Lane> a;
    if constexpr (D::kPerLane == 1) {
      a = {tile + j, 1, ld};
    } else {
      a = packed_strip<D>(columns, j, depth);
    }
    multiply_strip<D>(std::min<int64_t>(D::kTileRows, n - j), dim, depth, a, panels, panel,
                      sum + j * sum_ld, sum_ld, true);
  }
}

template <typename T>
class PositionGradients {
  using D = Dot<T>;
  using Lane = typename D::Lane;
  using Element = Operand<T>;  // of a tile

 public:
  template <typename From>
  void take_all(From& from, const AttentionParams& p, const Longest& longest, int64_t tile_rows,
                int64_t tile_keys) {
    if (!p.position_query) return;
    const int64_t most = PositionRange::most(longest), rows = round_up(longest.queries, tile_rows);
    dim_ = p.head_dim;
    padded_dim_ = round_up(dim_, kWidth);
    ld_ = round_up(PositionWindow::most(tile_rows, tile_keys), kTileCols);
    keys_ = from.template take<Lane>(panels(dim_) * panel_size<D>(most));
    queries_ = from.template take<Lane>(panels(dim_) * panel_size<D>(rows));
    shifted_ = from.template take<Element>(tile_rows * ld_ + kWidth);
    columns_ = from.template take<Lane>(
        D::kPerLane == 1 ? 0 : packed_columns<D>(round_up(ld_, kWidth), lanes<D>(tile_rows)));
    dquery_ = from.template take<float>(rows * padded_dim_);
    dkey_ = from.template take<float>((most + ld_) * padded_dim_);
    total_ = from.template take<float>(p.positions * padded_dim_);
  }
  // Before the first and after the last sequence of a head.
  void begin_head(const AttentionParams& p) {
    if (p.position_query) std::fill_n(total_, p.positions * padded_dim_, 0.0f);
  }
  void end_head(const AttentionGradParams& g, int64_t head) {
    const AttentionParams& p = g.forward;
    if (!p.position_query) return;
    for (int64_t r = 0; r < p.positions; ++r) {
      store_scaled(mutable_row<T>(g.dposition_key, 0, head, r), total_ + r * padded_dim_, dim_,
                   static_cast<float>(p.scale));
    }
  }
  void begin_sequence(const AttentionParams& p, const Sequence& s, int64_t head,
                      const PositionScores<T>& scores) {
    if (!p.position_query) return;
    range_ = scores.range();
    key_panel_ = panel_size<D>(range_.count);
    query_panel_ = panel_size<D>(s.q_len);
    pack_natural<D>(scores.rows(), dim_, dim_, range_.count, keys_);
    pack_natural<D>(row<T>(p.position_query, s.batch, head, s.first_query),
                    p.position_query.stride[2], dim_, s.q_len, queries_);
    std::fill_n(dquery_, s.q_len * padded_dim_, 0.0f);
    std::fill_n(dkey_, range_.count * padded_dim_, 0.0f);
  }
  void end_sequence(const AttentionGradParams& g, const Sequence& s, int64_t head) {
    const AttentionParams& p = g.forward;
    if (!p.position_query) return;
    for (int64_t i = 0; i < s.q_len; ++i) {
      store_scaled(mutable_row<T>(g.dposition_query, s.batch, head, s.first_query + i),
                   dquery_ + i * padded_dim_, dim_, static_cast<float>(p.scale));
    }
    for (int64_t r = 0; r < range_.count; ++r) {
      const int64_t at = range_.base + r;
      if (at < 0 || at >= p.positions) continue;
      for (int64_t d = 0; d < padded_dim_; d += kWidth) {
        float* to = total_ + at * padded_dim_ + d;
        store(to, load(to) + load(dkey_ + r * padded_dim_ + d));
      }
    }
  }
  // A tile of dS, its rows `ds_ld` apart: rows q … against keys [key, key + n).
  void add(const AttentionParams& p, const Sequence& s, const Element* ds, int64_t ds_ld, int64_t q,
           int64_t rows, int64_t key, int64_t n) {
    if (!p.position_query) return;
    const PositionWindow window(p, range_, s, q, rows, key, n);
    const int64_t width = std::min(window.width, range_.count - window.aligned);
    std::fill_n(shifted_, rows * ld_, Element{});
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(ds + r * ds_ld, n, shifted_ + r * ld_ + window.shift + rows - 1 - r);
    }
    const auto* a = reinterpret_cast<const Lane*>(shifted_);
    const int64_t ld = ld_ / D::kPerLane;
    for (int64_t i = 0; i < rows; i += D::kTileRows) {
      multiply_strip<D>(std::min<int64_t>(D::kTileRows, rows - i), dim_, lanes<D>(width),
                        {a + i * ld, ld, 1}, keys_ + window.aligned / D::kPerLane * kTileCols,
                        key_panel_, dquery_ + (q + i) * padded_dim_, padded_dim_, true);
    }
    add_transposed<T>(shifted_, ld_, rows, width, queries_ + q / D::kPerLane * kTileCols,
                      query_panel_, dim_, columns_, dkey_ + window.aligned * padded_dim_,
                      padded_dim_);
  }

 private:
  PositionRange range_;
  int64_t dim_ = 0, padded_dim_ = 0, ld_ = 0, key_panel_ = 0, query_panel_ = 0;
  Lane *keys_ = nullptr, *queries_ = nullptr, *columns_ = nullptr;
  Element* shifted_ = nullptr;
  float *dquery_ = nullptr, *dkey_ = nullptr, *total_ = nullptr;
};

}  // namespace ft::FT_ISA
