// The relative-position term of Transformer-XL (Dai et al. 2019) without a (T x S) matrix.
//
// Its score is position_query_i . position_key_p with p = position_zero + j - i. For the rows of
// one strip and the keys of one block these p are one short range, so the term is a product of the
// strip with a window of position_key, of which each row then takes a part that lies one further
// left than that of the row before.
#pragma once
#include "attention_blocks.h"
#include "scores.h"

namespace ft::FT_ISA {

// Rows [base, base + count) of position_key: what some rows and keys of one head meet. Those that
// do not exist, which no visible pair needs, are zeros.
struct PositionRange {
  int64_t base = 0, count = 0;

  PositionRange() = default;
  PositionRange(const AttentionParams& p, const Sequence& s, int64_t row_begin, int64_t row_end,
                int64_t key_begin, int64_t key_end) {
    const int64_t first = p.position_zero + s.column + key_begin - (row_end - 1);
    base = first - ((first % kTileCols) + kTileCols) % kTileCols;  // windows begin with a panel
    count = p.position_zero + s.column + key_end - row_begin - base;
  }
  static int64_t most(const Longest& longest) { return longest.queries + longest.keys + kTileCols; }
};

// The rows of a range, one after another.
template <typename T>
void gather_positions(const AttentionParams& p, const PositionRange& range, int64_t head, T* rows) {
  for (int64_t r = 0; r < range.count; ++r, rows += p.head_dim) {
    const int64_t at = range.base + r;
    if (at >= 0 && at < p.positions) {
      std::copy_n(row<T>(p.position_key, 0, head, at), p.head_dim, rows);
    } else {
      std::fill_n(rows, p.head_dim, T{});
    }
  }
}

// Where a strip of `count` rows from row i on meets keys [key, key + n): `width` columns from the
// panel at `aligned` on, of which the strip's last row uses those from `shift` on.
struct PositionWindow {
  int64_t aligned, shift, width;

  PositionWindow(const AttentionParams& p, const PositionRange& range, const Sequence& s, int64_t i,
                 int64_t count, int64_t key, int64_t n) {
    const int64_t first = p.position_zero + s.column + key - (i + count - 1) - range.base;
    aligned = first / kTileCols * kTileCols;
    shift = first - aligned;
    width = shift + n + count - 1;
  }
  static constexpr int64_t most(int64_t rows, int64_t keys) {
    return keys + rows + kTileCols + kWidth;
  }
};

// Adds the term to scores; absent where the call has none.
template <typename T>
class PositionScores {
  using D = Dot<T>;
  using Lane = typename D::Lane;

 public:
  template <typename From>
  void take_all(From& from, const AttentionParams& p, const Longest& longest, int64_t most_rows,
                int64_t most_keys) {
    if (!p.position_query) return;
    depth_ = lanes<D>(p.head_dim);
    panel_ = panel_size<D>(p.head_dim);
    ld_ = PositionWindow::most(D::kTileRows, most_keys);
    rows_ = from.template take<T>(PositionRange::most(longest) * p.head_dim);
    panels_ = from.template take<Lane>(panels(PositionRange::most(longest)) * panel_);
    queries_ = from.template take<Lane>(most_rows * depth_ + kWidth);
    products_ = from.template take<float>(D::kTileRows * ld_);
  }
  void pack_keys(const AttentionParams& p, const Sequence& s, int64_t head, int64_t row_begin,
                 int64_t row_end, int64_t key_begin, int64_t key_end) {
    if (!p.position_query) return;
    range_ = PositionRange(p, s, row_begin, row_end, key_begin, key_end);
    gather_positions(p, range_, head, rows_);
    pack_transposed<D>(rows_, p.head_dim, range_.count, p.head_dim, panels_);
  }
  void pack_queries(const AttentionParams& p, const Sequence& s, int64_t head, int64_t q,
                    int64_t rows) {
    if (!p.position_query) return;
    pack_rows<D>(row<T>(p.position_query, s.batch, head, s.first_query + q),
                 p.position_query.stride[2], rows, p.head_dim, queries_, depth_);
  }
  // To rows q + i … of the block that begins at row q and was packed.
  void add(const AttentionParams& p, const Sequence& s, int64_t q, int64_t i, int64_t count,
           int64_t key, int64_t n, float* scores, int64_t scores_ld) {
    if (!p.position_query) return;
    const PositionWindow window(p, range_, s, q + i, count, key, n);
    multiply_strip<D>(count, window.width, depth_, {queries_ + i * depth_, depth_, 1},
                      panels_ + window.aligned / kTileCols * panel_, panel_, products_, ld_, false);
    for (int64_t r = 0; r < count; ++r) {
      float* to = scores + r * scores_ld;
      const float* from = products_ + r * ld_ + window.shift + count - 1 - r;
      for (int64_t j = 0; j < n; j += kWidth) store(to + j, load(to + j) + load(from + j));
    }
  }
  const PositionRange& range() const { return range_; }
  const T* rows() const { return rows_; }

 private:
  PositionRange range_;
  int64_t depth_ = 0, panel_ = 0, ld_ = 0;
  T* rows_ = nullptr;
  Lane *panels_ = nullptr, *queries_ = nullptr;
  float* products_ = nullptr;
};

}  // namespace ft::FT_ISA
