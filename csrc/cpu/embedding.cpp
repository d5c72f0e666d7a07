// h = word + position + type embedding, out = dropout(norm(h) * weight + bias), and the gradients.
// Forward gathers the rows and writes out: the word's row comes from anywhere in a large table, so
// it is fetched ahead; those of positions and types stay in cache. Nothing but the statistics is
// kept: backward gathers again, writes dh, and adds that into each table's gradient, whose zeros,
// one row for every word there is, are most of its bytes.
#include "../common/embedding.h"

#include <algorithm>

#include "affine.h"
#include "dropout.h"
#include "norm.h"
#include "parallel.h"
#include "row_scatter.h"
#include "scratch.h"

namespace ft::FT_ISA {
namespace {

// Rows that make a unit of work: as many as fill this, of one tensor.
constexpr int64_t kUnitBytes = int64_t{32} << 10;
// Tokens between the fetch of a word's row and its use.
constexpr int64_t kAhead = 3;
// Tokens whose pages are looked up together: page walks overlap, where one for each row in turn
// would cost as much as the arithmetic. (Measured: 1024 of 30522 rows of 384, 187 to 135 us in
// bf16, 287 to 215 us in fp32.)
constexpr int64_t kPages = 16;

template <typename Params>
int64_t unit_rows(const Params& p) {
  const int64_t row = p.channels * (p.dtype == DType::kFloat32 ? 4 : 2);
  return ceil_div(kUnitBytes, row);
}

// The rows whose sum is h of a token. An absent table has one row of zeros.
template <typename T>
class Gather {
 public:
  template <typename Params>
  Gather(const Params& p, T* zeros) : tokens_(p.tokens), channels_(p.channels) {
    std::fill_n(zeros, channels_, T{});
    for (int i = 0; i < kEmbeddingTables; ++i) {
      tables_[i] = p.tables[i].rows ? p.tables[i] : EmbeddingTable{{zeros, {0}}, 1, nullptr, 1};
    }
  }
  const T* row_of(int table, int64_t token) const {
    return row<T>(tables_[table].rows, tables_[table].id(token));
  }
  void fetch_word(int64_t token) const {
    if (token % kPages == 0) {
      const int64_t end = std::min(tokens_, token + kPages);
      for (int64_t t = token; t < end; ++t) touch_word(t);
    }
    if (token >= tokens_) return;
    const auto* word = reinterpret_cast<const char*>(row_of(0, token));
    const int64_t bytes = channels_ * static_cast<int64_t>(sizeof(T));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(word + at);
  }

 private:
  // By loads: a prefetch does not wait for a page walk.
  void touch_word(int64_t token) const {
    const T* word = row_of(0, token);
    (void)*reinterpret_cast<const volatile char*>(word);
    (void)*reinterpret_cast<const volatile char*>(word + channels_ - 1);
  }

  const int64_t tokens_, channels_;
  EmbeddingTable tables_[kEmbeddingTables];
};

// h of a token. Called for vector after vector, it keeps h as floats and returns it.
template <typename T>
struct RowOfH {
  const T *word, *position, *type;
  float* h;

  RowOfH(const Gather<T>& gather, int64_t token, float* h)
      : word(gather.row_of(0, token)),
        position(gather.row_of(1, token)),
        type(gather.row_of(2, token)),
        h(h) {}
  FT_INLINE Vec operator()(int64_t j, int64_t n) const {
    const Vec v = load(word + j, n) + load(type + j, n) + load(position + j, n);
    store(h + j, v, n);
    return v;
  }
};

// ---- Forward

// Rows that are taken side by side: the sums of one are ready when the other's are added up.
constexpr int kRows = 2;

// What one thread needs for it.
template <typename T, bool kDrops>
class Forward {
 public:
  explicit Forward(const EmbeddingParams& p)
      : p_(p),
        row_space_(round_up(p.channels, 16)),
        scratch_(2 * Scratch::bytes<float>(p.channels) + Scratch::bytes<T>(p.channels) +
                 Scratch::bytes<float>(kRows * row_space_) +
                 Scratch::bytes<uint16_t>(draw_space(p.channels))),
        gather_(p, scratch_.take<T>(p.channels)) {
    float* weight = scratch_.take<float>(p.channels);
    float* bias = scratch_.take<float>(p.channels);
    weight_ = parameter(p.weight, p.weight_dtype, 1.0f, p.channels, weight);
    bias_ = parameter(p.bias, p.bias_dtype, 0.0f, p.channels, bias);
    h_ = scratch_.take<float>(kRows * row_space_);
    draws_ = scratch_.take<uint16_t>(draw_space(p.channels));
  }

  // Tokens [first, first + count), at most kRows.
  void run(int64_t first, int64_t count) const {
    LayerNorm norms[kRows];
    for (int64_t i = 0; i < count; ++i) {
      gather_.fetch_word(first + i + kAhead);
      float* h = h_ + i * row_space_;
      norms[i] = LayerNorm::of_row(p_.channels, p_.eps, RowOfH<T>(gather_, first + i, h),
                                   [&](int64_t j, int64_t n)
                                       __attribute__((always_inline)) { return load(h + j, n); });
      p_.mean[first + i] = norms[i].mean();
      p_.rstd[first + i] = norms[i].rstd();
    }
    for (int64_t i = 0; i < count; ++i) write(norms[i], h_ + i * row_space_, first + i);
  }

 private:
  void write(LayerNorm norm, const float* h, int64_t token) const {
    const float *weight = weight_, *bias = bias_;
    const uint16_t* draws = draws_;
    const Dropout dropout = p_.dropout;
    T* out = mutable_row<T>(p_.out, token);
    if constexpr (kDrops) draw_row(dropout.seed, 0, p_.channels, token, 0, 0, draws_);
    for_vectors(0, p_.channels, [&](int64_t j, int64_t n, int) __attribute__((always_inline)) {
      const Vec x_hat = norm.normalised(load(h + j, n));
      Vec y = fma(x_hat, load(weight + j, n), load(bias + j, n));
      if constexpr (kDrops) y = drop(y, draws + j, dropout.threshold, dropout.scale);
      store(out + j, y, n);
    });
  }

  const EmbeddingParams& p_;
  const int64_t row_space_;
  Scratch scratch_;
  const Gather<T> gather_;
  const float *weight_, *bias_;
  float* h_;
  uint16_t* draws_;
};

template <typename T, bool kDrops>
void forward(const EmbeddingParams& p, const Parallel& parallel) {
  const int64_t block = round_up(unit_rows(p), kRows);
  for_units(parallel, ceil_div(p.tokens, block), [&](Units& units) {
    const Forward<T, kDrops> worker(p);
    for (int64_t unit; units.next(unit);) {
      const int64_t end = std::min(p.tokens, (unit + 1) * block);
      for (int64_t t = unit * block; t < end; t += kRows) {
        worker.run(t, std::min<int64_t>(kRows, end - t));
      }
    }
  });
}

// ---- Backward

// What one thread needs for it.
template <typename T, bool kDrops>
class Backward {
 public:
  // dh is written to `dh` (tokens, channels), unless that is null.
  Backward(const EmbeddingGradParams& p, T* dh)
      : p_(p),
        dh_(dh),
        scratch_(Scratch::bytes<T>(p.channels) + 2 * Scratch::bytes<float>(p.channels) +
                 Scratch::bytes<uint16_t>(draw_space(p.channels))),
        gather_(p, scratch_.take<T>(p.channels)) {
    float* weight = scratch_.take<float>(p.channels);
    weight_ = parameter(p.weight, p.weight_dtype, 1.0f, p.channels, weight);
    h_ = scratch_.take<float>(p.channels);
    draws_ = scratch_.take<uint16_t>(draw_space(p.channels));
  }

  // Writes dh of tokens [begin, end), adds their shares to dweight and dbias.
  void run(int64_t begin, int64_t end, float* dweight, float* dbias) const {
    for (int64_t token = begin; token < end; ++token) run(token, dweight, dbias);
  }

 private:
  void run(int64_t token, float* dweight, float* dbias) const {
    gather_.fetch_word(token + kAhead);
    const int64_t channels = p_.channels;
    const T* grad_out = row<T>(p_.grad_out, token);
    const float *weight = weight_, *h = h_;
    const uint16_t* draws = draws_;
    const Dropout dropout = p_.dropout;
    if constexpr (kDrops) draw_row(dropout.seed, 0, channels, token, 0, 0, draws_);
    const auto gradient = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vec g = load(grad_out + j, n);
      if constexpr (kDrops) g = drop(g, draws + j, dropout.threshold, dropout.scale);
      return g;
    };
    const auto norm = LayerNorm::Gradient::of_row(
        channels, p_.mean[token], p_.rstd[token],
        [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          return rounded_product(gradient(j, n), load(weight + j, n));
        },
        RowOfH<T>(gather_, token, h_));
    T* dh = dh_ ? dh_ + token * channels : nullptr;
    for_vectors(0, channels, [&](int64_t j, int64_t n, int) __attribute__((always_inline)) {
      const Vec g = gradient(j, n), x_hat = norm.normalised(load(h + j, n));
      if (dh) store(dh + j, norm.dh(rounded_product(g, load(weight + j, n)), x_hat), n);
      store(dweight + j, fma(g, x_hat, load(dweight + j)));
      store(dbias + j, load(dbias + j) + g);
    });
  }

  const EmbeddingGradParams& p_;
  T* const dh_;
  Scratch scratch_;
  const Gather<T> gather_;
  const float* weight_;
  float* h_;
  uint16_t* draws_;
};

template <typename T, bool kDrops>
void backward(const EmbeddingGradParams& p, const Parallel& parallel) {
  const int64_t rows =
      std::any_of(p.dtables, p.dtables + kEmbeddingTables, [](void* t) { return t != nullptr; })
          ? p.tokens
          : 0;
  Scratch scratch(Scratch::bytes<T>(rows * p.channels));
  T* dh = rows ? scratch.take<T>(rows * p.channels) : nullptr;
  AffineGradient affine(p.tokens, p.channels);
  affine.add_rows(parallel, unit_rows(p), [&] { return Backward<T, kDrops>(p, dh); });
  affine.finish(parallel, p.dweight, p.dbias);
  for (int i = 0; i < kEmbeddingTables; ++i) {
    if (!p.dtables[i]) continue;
    scatter_rows<T>(parallel, p.tables[i], p.tokens, p.padding[i], dh, p.channels,
                    static_cast<T*>(p.dtables[i]));
  }
}

}  // namespace

void embedding_norm_fwd(const EmbeddingParams& p, const Parallel& parallel) {
  if (p.channels == 0) {  // rows without elements have no statistics
    std::fill_n(p.mean, p.tokens, 0.0f);
    std::fill_n(p.rstd, p.tokens, 0.0f);
    return;
  }
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    p.dropout.active() ? forward<T, true>(p, parallel) : forward<T, false>(p, parallel);
  });
}

void embedding_norm_bwd(const EmbeddingGradParams& p, const Parallel& parallel) {
  if (p.channels == 0) return;
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    p.dropout.active() ? backward<T, true>(p, parallel) : backward<T, false>(p, parallel);
  });
}

}  // namespace ft::FT_ISA
