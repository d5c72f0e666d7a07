// C of few rows, which B is not packed for: dots.h, streamed_rows.h or the matrix unit read it in
// place, a share of its columns a unit of work.
#include "few_rows.h"

#include <algorithm>

#include "few_rows_amx.h"
#include "scratch.h"

namespace ft::FT_ISA {
namespace {

// Products below this take less time than waking a thread.
constexpr int64_t kSerialProducts = int64_t{1} << 19;
// Of C's rows that a streamed B is added to: a share of L1. And elements of k that are added up,
// sixteen a step, before the sums of others: so no sum has many terms, and rounding errors stay
// small.
constexpr int64_t kStreamedBytes = int64_t{24} << 10;
constexpr int64_t kLeastRun = 256;  // of columns
constexpr int64_t kStreamedSum = 256;

// Columns of a unit of few rows. A streamed B is read in runs that are as long as can be.
template <typename D>
int64_t few_columns(const Size& size, const Right<D>& b, int64_t threads) {
  if (!b.streamed) return kTileCols;
  const int64_t most = kStreamedBytes / (size.m * static_cast<int64_t>(sizeof(float)));
  const int64_t units = std::max(ceil_div(size.n, most), threads > 1 ? 2 * threads : 1);
  return round_up(std::max(ceil_div(size.n, units), std::min(size.n, kLeastRun)), kTileCols);
}

// Hands C of all rows and columns [n, n + cols) over, a tile at a time.
template <typename D>
void finish_columns(const Finish& finish, int64_t rows, int64_t n, int64_t cols, const float* c,
                    int64_t ldc) {
  for (int64_t j = 0; j < cols; j += kTileCols) {
    const int64_t some = std::min<int64_t>(kTileCols, cols - j);
    for (int64_t r = 0; r < rows; r += D::kTileRows) {
      const int64_t tall = std::min<int64_t>(D::kTileRows, rows - r);
      finish.call(finish.context, {r, tall, n + j, some, c + r * ldc + j, ldc});
    }
  }
}

#if defined(__AMX_BF16__)
// B is contiguous along k.
void few_rows_in_unit(const Parallel& parallel, const Size& size, const uint32_t* x, int64_t x_ld,
                      const Right<BFloat16Dot>& b, const Finish& finish) {
  const int64_t k = size.k, lanes_of_x = unit_rows(size.m, k);
  Scratch scratch(Scratch::bytes<uint32_t>(lanes_of_x));
  uint32_t* packed = scratch.take<uint32_t>(lanes_of_x);
  pack_rows_amx(x, x_ld, size.m, lanes<BFloat16Dot>(k), packed);
  for_units(parallel, panels(size.n), [&](Units& units) {
    const FewRowsUnit unit(true);
    const int64_t count = size.m * kTileCols;
    Scratch own(Scratch::bytes<float>(count) + Scratch::bytes<bf16>(unit_copies(k)));
    float* c = own.take<float>(count);
    bf16* copies = own.take<bf16>(unit_copies(k));
    for (int64_t i; units.next(i);) {
      const int64_t n = i * kTileCols, cols = std::min<int64_t>(kTileCols, size.n - n);
      const bf16* columns[kTileCols];
      for (int64_t j = 0; j < kTileCols; ++j) {
        columns[j] = static_cast<const bf16*>(b.column(b, n + std::min(j, cols - 1)));
      }
      dot_rows_amx(packed, size.m, k, columns, cols, copies, c, kTileCols);
      finish_columns<BFloat16Dot>(finish, size.m, n, cols, c, kTileCols);
    }
  });
}
#endif

template <typename D>
void one_product(const Parallel& parallel, const Size& size, const Left<D>& a, const Right<D>& b,
                 const Finish& finish) {
  using Lane = typename D::Lane;
  const int64_t depth = lanes<D>(size.k);
  Scratch scratch(Scratch::bytes<Lane>(a.pack ? size.m * depth : 0));
  const Lane* x = static_cast<const Lane*>(a.data);
  int64_t x_ld = a.ld / D::kPerLane;
  if (a.pack) {
    Lane* packed = scratch.take<Lane>(size.m * depth);
    a.pack(a, 0, size.m, 0, size.k, packed);
    x = packed;
    x_ld = depth;
  }
  Parallel threads = parallel;
  if (size.m * size.n * size.k < kSerialProducts) threads.threads = 1;
  if constexpr (D::kInMatrixUnit) {
    if (b.in_lanes && size.of >= kUnitFewest) {
      return few_rows_in_unit(threads, size, x, x_ld, b, finish);
    }
  }
  const int64_t each = few_columns(size, b, threads.threads);
  const int64_t sum = b.streamed ? kStreamedSum : size.k;
  for_units(threads, ceil_div(size.n, each), [&](Units& units) {
    const int64_t count = size.m * each;
    Scratch own(Scratch::bytes<float>(count) * (size.k > sum ? 2 : 1));
    float* c = own.take<float>(count);
    float* more = size.k > sum ? own.take<float>(count) : nullptr;
    for (int64_t i; units.next(i);) {
      const int64_t n = i * each, cols = std::min(each, size.n - n);
      b.few(b, x, x_ld, size.m, n, cols, 0, std::min(sum, size.k), c, each);
      for (int64_t at = sum; at < size.k; at += sum) {
        b.few(b, x, x_ld, size.m, n, cols, at, std::min(sum, size.k - at), more, each);
        for (int64_t j = 0; j < count; j += kWidth) store(c + j, load(c + j) + load(more + j));
      }
      finish_columns<D>(finish, size.m, n, cols, c, each);
    }
  });
}

// Few rows of a sum: one product after the other, for each reads its B in place. What came before
// waits in `total` and is added to the tiles of the last.
template <typename D>
void few_rows_of_sum(const Parallel& parallel, const Size& size, std::span<const Product<D>> sum,
                     const Finish& finish) {
  const int64_t ld = panels(size.n) * kTileCols;
  Scratch scratch(Scratch::bytes<float>(size.m * ld));
  float* total = scratch.take<float>(size.m * ld);
  for (const Product<D>& product : sum) {
    const bool first = &product == &sum.front(), last = &product == &sum.back();
    const auto add = [&](const Tile& tile) {
      float own[kMostTileRows * kTileCols];
      for (int64_t r = 0; r < tile.rows; ++r) {
        float* so_far = total + (tile.row + r) * ld + tile.col;
        float* to = last ? own + r * kTileCols : so_far;
        for (int64_t j = 0; j < tile.cols; j += kWidth) {
          const Vec v = load(tile.c + r * tile.ldc + j);
          store(to + j, first ? v : v + load(so_far + j));
        }
      }
      if (!last) return;
      finish.call(finish.context, {tile.row, tile.rows, tile.col, tile.cols, own, kTileCols});
    };
    one_product(parallel, {size.m, size.n, product.k, size.of}, product.a, product.b,
                finish_of(add));
  }
}

}  // namespace

template <typename D>
void multiply_few_rows(const Parallel& parallel, const Size& size, std::span<const Product<D>> sum,
                       const Finish& finish) {
  if (sum.size() > 1) return few_rows_of_sum(parallel, size, sum, finish);
  one_product(parallel, {size.m, size.n, sum[0].k, size.of}, sum[0].a, sum[0].b, finish);
}

template void multiply_few_rows(const Parallel&, const Size&, std::span<const Product<FloatDot>>,
                                const Finish&);
#if defined(__AVX512BF16__)
template void multiply_few_rows(const Parallel&, const Size&, std::span<const Product<BFloat16Dot>>,
                                const Finish&);
#endif

}  // namespace ft::FT_ISA
