// h = residual + dropout(x), out = norm(h) * weight + bias, and the gradients of it.
// Forward moves x, residual, h (where it is kept) and out through memory once; backward dout, h, the
// gradient of h and dx. About 12 and 20 FLOPs an element, so bytes are the cost, and Philox where
// there is dropout. Rows are taken a few at a time, so that the latency of one row's statistics hides
// behind the next row's loads. A row is read again from L1, where its first pass has put it.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/norm.h"
#include "dropout.h"
#include "norm.h"
#include "parallel.h"
#include "scratch.h"

namespace ft::FT_ISA {
namespace {

constexpr int kRows = 4;                      // taken at a time
constexpr int64_t kUnitBytes = int64_t{32} << 10;  // of one tensor; waking a thread takes as long

// Rows that make a unit of work.
int64_t unit_rows(int64_t channels, size_t element) {
  const int64_t row = std::max<int64_t>(1, channels * static_cast<int64_t>(element));
  return round_up(ceil_div(kUnitBytes, row), kRows);
}

// Calls `f` with a value of the storage type and with the flags as compile-time constants.
template <typename F>
void with_storage(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) return f(bf16{});
  if (dtype == DType::kFloat16) return f(fp16{});
  return f(float{});
}
template <typename F>
void with_flags(bool a, bool b, const F& f) {
  if (a) {
    b ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  } else {
    b ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
  }
}

// weight or bias as floats: where it is, or written to `buffer`, or `absent` everywhere.
const float* parameter(const void* data, DType dtype, float absent, int64_t channels,
                       float* buffer) {
  if (!data) {
    std::fill_n(buffer, channels, absent);
    return buffer;
  }
  if (dtype == DType::kFloat32) return static_cast<const float*>(data);
  with_storage(dtype, [&](auto storage) {
    const auto* from = static_cast<const decltype(storage)*>(data);
    for (int64_t j = 0; j < channels; j += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, channels - j);
      store(buffer + j, load(from + j, n), n);
    }
  });
  return buffer;
}

// ---- Forward

// h = residual + dropout(x), rounded as it is stored; returns the sum of what was stored.
template <typename T, bool kAdds, bool kDrops>
FT_INLINE double add_row(const T* x, const T* residual, const uint16_t* draws,
                         const Dropout& dropout, int64_t channels, T* h) {
  return row_sums<1>(channels,
                     [&](int64_t j, int64_t n, Vec* s) __attribute__((always_inline)) {
                       Vec v = load(x + j, n);
                       if constexpr (kDrops) {
                         v = drop(v, draws + j, dropout.threshold, dropout.scale);
                       }
                       if constexpr (kAdds) v += load(residual + j, n);
                       store(h + j, v, n);
                       if constexpr (sizeof(T) == 2) v = to_float(from_float(v, T{}), T{});
                       s[0] += v;
                     })
      .of[0];
}

template <typename Norm, typename T, bool kAdds, bool kDrops>
void forward(const NormParams& p, const Parallel& parallel) {
  constexpr bool kMakesH = kAdds || kDrops;  // otherwise h is x
  const int64_t C = p.channels, block = unit_rows(C, sizeof(T));
  const int64_t row_space = kMakesH && !p.sum ? round_up(C, 64) : 0;
  for_units(parallel, ceil_div(p.rows, block), [&](Units& units) {
    Scratch scratch(2 * Scratch::bytes<float>(C) + Scratch::bytes<T>(kRows * row_space) +
                    Scratch::bytes<uint16_t>(draw_space(C)));
    float* weight_buffer = scratch.take<float>(C);
    float* bias_buffer = scratch.take<float>(C);
    T* rows = scratch.take<T>(kRows * row_space);
    uint16_t* draws = scratch.take<uint16_t>(draw_space(C));
    const float* weight = parameter(p.weight, p.weight_dtype, 1.0f, C, weight_buffer);
    const float* bias = parameter(p.bias, p.bias_dtype, 0.0f, C, bias_buffer);

    int64_t unit;
    while (units.next(unit)) {
      const int64_t end = std::min(p.rows, (unit + 1) * block);
      for (int64_t first = unit * block; first < end; first += kRows) {
        const int count = static_cast<int>(std::min<int64_t>(kRows, end - first));
        const T* h[kRows];
        double total[kRows];
        Norm norm[kRows];
        for (int i = 0; i < count; ++i) {
          const T* x = row<T>(p.x, first + i);
          if constexpr (kMakesH) {
            T* made = p.sum ? mutable_row<T>(p.sum, first + i) : rows + i * row_space;
            const T* residual = kAdds ? row<T>(p.residual, first + i) : nullptr;
            if constexpr (kDrops) draw_row(p.dropout.seed, 0, C, first + i, 0, 0, draws);
            total[i] = add_row<T, kAdds, kDrops>(x, residual, draws, p.dropout, C, made);
            h[i] = made;
          } else {
            if (p.sum) std::memcpy(mutable_row<T>(p.sum, first + i), x, C * sizeof(T));
            total[i] = row_sums<1>(C, [&](int64_t j, int64_t n, Vec* s)
                                          __attribute__((always_inline)) { s[0] += load(x + j, n); })
                           .of[0];
            h[i] = x;
          }
        }
        for (int i = 0; i < count; ++i) {
          norm[i] = Norm::of_row(h[i], C, total[i], p.eps);
          p.mean[first + i] = norm[i].mean();
          p.rstd[first + i] = norm[i].rstd();
        }
        for (int i = 0; i < count; ++i) {
          T* out = mutable_row<T>(p.out, first + i);
          for_vectors(0, C, [&](int64_t j, int64_t n, int) __attribute__((always_inline)) {
            const Vec x_hat = norm[i].normalised(load(h[i] + j, n));
            store(out + j, fma(x_hat, load(weight + j, n), load(bias + j, n)), n);
          });
        }
      }
    }
  });
}

// ---- Backward

// Sums over rows are taken chunk by chunk, and the chunks' sums in a fixed tree: the same bits for
// every number of threads, and errors that grow like a pairwise sum's. At most 128 rows a chunk, so
// that few values meet in one float; at least 16, so that chunks' sums are little beside the rows
// they stand for; between them, so many that 128 chunks keep all threads busy.
int64_t chunk_rows(int64_t rows) {
  return std::clamp<int64_t>(round_up(ceil_div(rows, 128), kRows), 16, 128);
}

// dweight and dbias of every chunk: [chunk][2][width].
struct Partials {
  float* data;
  int64_t chunks, width;

  float* dweight(int64_t chunk) const { return data + 2 * chunk * width; }
  float* dbias(int64_t chunk) const { return dweight(chunk) + width; }
};

// Adds chunk c + step to chunk c for step = 1, 2, 4, …; what is left in chunk 0 is the result.
void reduce(const Partials& partials, const NormGradParams& p, const Parallel& parallel) {
  const int64_t block =
      round_up(ceil_div(kUnitBytes, partials.chunks * static_cast<int64_t>(sizeof(float))), 64);
  for_units(parallel, ceil_div(p.channels, block), [&](Units& units) {
    int64_t unit;
    while (units.next(unit)) {
      const int64_t begin = unit * block, end = std::min(p.channels, begin + block);
      for (int64_t step = 1; step < partials.chunks; step *= 2) {
        for (int64_t c = 0; c + step < partials.chunks; c += 2 * step) {
          for (int64_t j = begin; j < end; j += kWidth) {
            float* dweight = partials.dweight(c) + j;
            float* dbias = partials.dbias(c) + j;
            store(dweight, load(dweight) + load(partials.dweight(c + step) + j));
            store(dbias, load(dbias) + load(partials.dbias(c + step) + j));
          }
        }
      }
      const size_t bytes = (end - begin) * sizeof(float);
      if (p.dweight) std::memcpy(p.dweight + begin, partials.dweight(0) + begin, bytes);
      if (p.dbias) std::memcpy(p.dbias + begin, partials.dbias(0) + begin, bytes);
    }
  });
}

// kCount rows from `first` on: their dh and dx are written, their shares of dweight and dbias added
// up in registers and then to `dweight` and `dbias`.
template <typename Norm, typename T, bool kDrops, bool kAddsGrad, int kCount>
FT_INLINE void backward_rows(const NormGradParams& p, int64_t first, const float* weight,
                             uint16_t* draws, float* dweight, float* dbias) {
  const int64_t C = p.channels;
  const T *grad_out[kCount], *grad_sum[kCount], *h[kCount];
  T *dresidual[kCount], *dx[kCount];
  typename Norm::Gradient norm[kCount];
  for (int i = 0; i < kCount; ++i) {
    const int64_t r = first + i;
    grad_out[i] = row<T>(p.grad_out, r);
    grad_sum[i] = kAddsGrad ? row<T>(p.grad_sum, r) : nullptr;
    h[i] = row<T>(p.sum, r);
    dresidual[i] = mutable_row<T>(p.dresidual, r);
    dx[i] = kDrops ? mutable_row<T>(p.dx, r) : nullptr;
    if constexpr (kDrops) {
      draw_row(p.dropout.seed, 0, C, r, 0, 0, draws + i * draw_space(C));
    }
    norm[i] = Norm::Gradient::of_row(
        C, p.mean[r], p.rstd[r],
        [&](int64_t j, int64_t n)
            __attribute__((always_inline)) {
          return rounded_product(load(grad_out[i] + j, n), load(weight + j, n));
        },
        [&](int64_t j, int64_t n) __attribute__((always_inline)) { return load(h[i] + j, n); });
  }
  for_vectors(0, C, [&](int64_t j, int64_t n, int) __attribute__((always_inline)) {
    const Vec w = load(weight + j, n);
    Vec dw = zero(), db = zero();
    for (int i = 0; i < kCount; ++i) {
      const Vec g = load(grad_out[i] + j, n), x_hat = norm[i].normalised(load(h[i] + j, n));
      dw = fma(g, x_hat, dw);
      db += g;
      Vec dh = norm[i].dh(rounded_product(g, w), x_hat);
      if constexpr (kAddsGrad) dh += load(grad_sum[i] + j, n);
      store(dresidual[i] + j, dh, n);
      if constexpr (kDrops) {
        const uint16_t* d = draws + i * draw_space(C) + j;
        store(dx[i] + j, drop(dh, d, p.dropout.threshold, p.dropout.scale), n);
      }
    }
    store(dweight + j, load(dweight + j) + dw);
    store(dbias + j, load(dbias + j) + db);
  });
}

template <typename Norm, typename T, bool kDrops, bool kAddsGrad>
void backward(const NormGradParams& p, const Parallel& parallel) {
  const int64_t C = p.channels, chunk = chunk_rows(p.rows), width = round_up(C, 64);
  const int64_t chunks = std::max<int64_t>(1, ceil_div(p.rows, chunk));  // without rows: zeros
  const int64_t unit_chunks = ceil_div(unit_rows(C, sizeof(T)), chunk);
  Scratch sums(Scratch::bytes<float>(2 * chunks * width));
  const Partials partials{sums.take<float>(2 * chunks * width), chunks, width};
  for_units(parallel, ceil_div(chunks, unit_chunks), [&](Units& units) {
    const int64_t draws_space = kDrops ? kRows * draw_space(C) : 0;
    Scratch scratch(Scratch::bytes<float>(C) + Scratch::bytes<uint16_t>(draws_space));
    float* weight_buffer = scratch.take<float>(C);
    uint16_t* draws = scratch.take<uint16_t>(draws_space);
    const float* weight = parameter(p.weight, p.weight_dtype, 1.0f, C, weight_buffer);
    int64_t unit;
    while (units.next(unit)) {
      const int64_t last = std::min(chunks, (unit + 1) * unit_chunks);
      for (int64_t c = unit * unit_chunks; c < last; ++c) {
        float *dweight = partials.dweight(c), *dbias = partials.dbias(c);
        std::fill_n(dweight, 2 * width, 0.0f);
        const int64_t end = std::min(p.rows, (c + 1) * chunk);
        int64_t r = c * chunk;
        for (; r + kRows <= end; r += kRows) {
          backward_rows<Norm, T, kDrops, kAddsGrad, kRows>(p, r, weight, draws, dweight, dbias);
        }
        for (; r < end; ++r) {
          backward_rows<Norm, T, kDrops, kAddsGrad, 1>(p, r, weight, draws, dweight, dbias);
        }
      }
    }
  });
  if (p.dweight || p.dbias) reduce(partials, p, parallel);
}

}  // namespace

void norm_fwd(const NormParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) {
    with_flags(bool(p.residual), p.dropout.active(), [&](auto adds, auto drops) {
      forward<LayerNorm, decltype(storage), adds, drops>(p, parallel);
    });
  });
}

void norm_bwd(const NormGradParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) {
    with_flags(bool(p.dx), bool(p.grad_sum), [&](auto drops, auto adds_grad) {
      backward<LayerNorm, decltype(storage), drops, adds_grad>(p, parallel);
    });
  });
}

}  // namespace ft::FT_ISA
