// Block sizes of attention, forward and backward, and what both passes share.
//
// They depend on head_dim and the storage type alone. So a sequence is cut, and its sums are
// ordered, the same way whatever else is in the batch and however many threads run.
#pragma once
#include "dropout.h"
#include "mask.h"
#include "pack.h"
#include "parallel.h"
#include "scratch.h"
#include "softmax.h"

namespace ft::FT_ISA {

// Forward: a block of keys and their values takes at most half of a 1 MB L2 and is used by so many
// rows of queries before the next block replaces it; the scores of a strip stay in L1. Sums over
// keys start anew with each block, which keeps their rounding error down (see kSumLanes).
struct ForwardBlocks {
  int64_t keys, queries = 192;
  template <typename D>
  static ForwardBlocks of(int64_t head_dim) {
    return {D::kInMatrixUnit || lanes<D>(head_dim) <= 128 ? 256 : 128};
  }
};
// Backward holds five operands and two kQueries x kKeys tiles (P and dS) at a time. The matrix unit
// reads and writes a sum at every product, so its products want to be deep.
template <typename D>
struct BackwardBlocks {
  static constexpr int64_t kKeys = D::kInMatrixUnit ? 256 : 128;
  static constexpr int64_t kQueries = D::kInMatrixUnit ? 256 : 96;
};

// The longest effective sequence of the batch: what a worker's scratch must hold.
struct Longest {
  int64_t queries = 0, keys = 0;
  explicit Longest(const AttentionParams& p) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s(p, b);
      queries = s.q_len > queries ? s.q_len : queries;
      keys = s.kv_len > keys ? s.kv_len : keys;
    }
  }
};

// Draws of row i for keys [key, key + n), see draw_row.
FT_INLINE const uint16_t* attention_draws(const AttentionParams& p, const Sequence& s, int64_t head,
                                          int64_t i, int64_t key, int64_t n, uint16_t* buffer) {
  const int64_t column = s.column + key;
  return draw_row(p.dropout.seed, column, column + n, i, head, s.index, buffer);
}

// Rows of one head lie too far apart for the hardware to see the next ones coming. They are fetched
// into L2, since L1 is full.
template <typename T>
void fetch_rows(const HeadsView& v, int64_t dim, int64_t batch, int64_t head, int64_t begin,
                int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = begin; i < begin + count; ++i) {
    const T* at = row<T>(v, batch, head, i);
    for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(at + d, 0, 2);
  }
}

// Rows of that number of a head's query, and with the first head of a group of its key and value.
template <typename T>
void fetch_inputs(const AttentionParams& p, const Sequence& s, int64_t head, int64_t begin,
                  int64_t count) {
  fetch_rows<T>(p.query, p.head_dim, s.batch, head, s.first_query + begin, count);
  const int64_t group = p.heads / p.kv_heads;
  if (head % group != 0) return;
  count = std::min(count, s.kv_len - begin);
  fetch_rows<T>(p.key, p.head_dim, s.batch, head / group, s.first_key + begin, count);
  fetch_rows<T>(p.value, p.value_dim, s.batch, head / group, s.first_key + begin, count);
}

template <typename T>
FT_INLINE void store_zeros(T* dst, int64_t n) {
  for (int64_t d = 0; d < n; d += kWidth) store(dst + d, zero(), n - d);
}
template <typename T>
FT_INLINE void store_scaled(T* dst, const float* src, int64_t n, float factor) {
  for (int64_t d = 0; d < n; d += kWidth) store(dst + d, load(src + d) * factor, n - d);
}
FT_INLINE void scale_row(float* x, int64_t n, float factor) {
  for (int64_t d = 0; d < n; d += kWidth) store(x + d, load(x + d) * factor);
}

}  // namespace ft::FT_ISA
