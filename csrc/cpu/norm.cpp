// h = residual + dropout(x), out = norm(h) * weight + bias, and the gradients of it. The norm, and
// whether there is a bias, is the class that norm.h makes of it.
// Forward moves x, residual, h (where it is kept) and out through memory once; backward dout, h,
// the gradient of h and dx. About 10 and 20 FLOPs an element: bytes are the cost, and Philox where
// there is dropout. Both pass over a row twice, first for its sums; the second time it is in L1, or
// in L2 where it is long.
#include "../common/norm.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "affine.h"
#include "dropout.h"
#include "norm.h"
#include "parallel.h"
#include "scratch.h"

namespace ft::FT_ISA {
namespace {

// Of one tensor that a unit of work moves: waking a thread takes about as long as that.
constexpr int64_t kUnitBytes = int64_t{32} << 10;
// Rows that are taken side by side: the sums of one are ready when the other's are added up, and
// backward loads and stores dweight and dbias once for both.
constexpr int kRows = 2;

// The bytes by which a loop fetches ahead of itself what it reads, and what it writes: the
// processor does the same, but stops at the end of a page, and a row may be shorter than one. Half
// and twice as much measured alike from L3 (Sapphire Rapids), where it makes backward a quarter
// faster.
constexpr int64_t kReadAhead = 2048, kWriteAhead = 1024;
template <int64_t kAhead>
FT_INLINE void fetch(const void* at) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + kAhead));
}

// The draws of row r; columns of its two tensors that are read next are fetched meanwhile.
template <typename T>
FT_INLINE void draw(const Dropout& dropout, int64_t channels, int64_t r, uint16_t* draws,
                    const T* first, const T* second) {
  draw_row(dropout.seed, 0, channels, r, 0, 0, draws,
           [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
             constexpr int64_t kLine = 64 / sizeof(T);
             for (int64_t j = begin; j < end; j += kLine) {
               __builtin_prefetch(first + j);
               __builtin_prefetch(second + j);
             }
           });
}

// Rows that make a unit of work.
int64_t unit_rows(int64_t channels, size_t element) {
  const int64_t row = std::max<int64_t>(1, channels * static_cast<int64_t>(element));
  return round_up(ceil_div(kUnitBytes, row), kRows);
}

// Calls `f` with the flags as compile-time constants.
template <typename F>
void with_flags(bool a, bool b, const F& f) {
  if (a) {
    b ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  } else {
    b ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
  }
}

// ---- Forward

// A row of h = residual + dropout(x), where there is either; otherwise h is x. Called for vector
// after vector, it stores h and returns what it stored: rounded, as backward will read it.
template <typename T, bool kAdds, bool kDrops>
struct RowOfH {
  const T *x, *residual;
  const uint16_t* draws;
  const Dropout& dropout;
  T* h;

  FT_INLINE Vec operator()(int64_t j, int64_t n) const {
    fetch<kReadAhead>(x + j);
    Vec v = load(x + j, n);
    if constexpr (kDrops) v = drop(v, draws + j, dropout.threshold, dropout.scale);
    if constexpr (kAdds) {
      fetch<kReadAhead>(residual + j);
      v += load(residual + j, n);
    }
    if constexpr (kAdds || kDrops) {
      fetch<kWriteAhead>(h + j);
      store(h + j, v, n);
      if constexpr (sizeof(T) == 2) v = to_float(from_float(v, T{}), T{});
    }
    return v;
  }
};

// What one thread needs for it.
template <typename Norm, typename T, bool kAdds, bool kDrops>
class Forward {
  static constexpr bool kMakesH = kAdds || kDrops;

 public:
  explicit Forward(const NormParams& p)
      : p_(p),
        row_space_(kMakesH && !p.sum ? round_up(p.channels, 64) : 0),
        scratch_(2 * Scratch::bytes<float>(p.channels) + Scratch::bytes<T>(kRows * row_space_) +
                 Scratch::bytes<uint16_t>(draw_space(p.channels))) {
    float* weight = scratch_.take<float>(p.channels);
    float* bias = scratch_.take<float>(p.channels);
    weight_ = parameter(p.weight, p.weight_dtype, 1.0f, p.channels, weight);
    bias_ = parameter(p.bias, p.bias_dtype, 0.0f, p.channels, bias);
    rows_ = scratch_.take<T>(kRows * row_space_);
    draws_ = scratch_.take<uint16_t>(draw_space(p.channels));
  }

  // Rows [first, first + count), at most kRows.
  void run(int64_t first, int64_t count) {
    const T* h[kRows];
    Norm norms[kRows];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + i;
      T* made = p_.sum ? mutable_row<T>(p_.sum, r) : rows_ + i * row_space_;
      const T *x = row<T>(p_.x, r), *residual = kAdds ? row<T>(p_.residual, r) : nullptr;
      h[i] = kMakesH ? made : x;
      norms[i] = measure({x, residual, draws_, p_.dropout, made}, r, h[i]);
      if (!kMakesH && p_.sum) std::memcpy(made, x, p_.channels * sizeof(T));
    }
    for (int64_t i = 0; i < count; ++i) write(norms[i], h[i], mutable_row<T>(p_.out, first + i));
  }

 private:
  Norm measure(RowOfH<T, kAdds, kDrops> make, int64_t r, const T* h) const {
    if constexpr (kDrops) draw<T>(p_.dropout, p_.channels, r, draws_, make.x, make.h);
    const Norm norm = Norm::of_row(p_.channels, p_.eps, make,
                                   [&](int64_t j, int64_t n)
                                       __attribute__((always_inline)) { return load(h + j, n); });
    if (p_.rstd) {
      if constexpr (Norm::kHasMean) p_.mean[r] = norm.mean();
      p_.rstd[r] = norm.rstd();
    }
    return norm;
  }

  void write(Norm norm, const T* h, T* out) const {
    const float *weight = weight_, *bias = bias_;
    for_vectors(0, p_.channels, [&](int64_t j, int64_t n, int) __attribute__((always_inline)) {
      fetch<kWriteAhead>(out + j);
      Vec v = norm.normalised(load(h + j, n)) * load(weight + j, n);
      if constexpr (Norm::kHasBias) v += load(bias + j, n);
      store(out + j, v, n);
    });
  }

  const NormParams& p_;
  const int64_t row_space_;
  Scratch scratch_;
  const float *weight_, *bias_;
  T* rows_;
  uint16_t* draws_;
};

template <typename Norm, typename T, bool kAdds, bool kDrops>
void forward(const NormParams& p, const Parallel& parallel) {
  const int64_t block = unit_rows(p.channels, sizeof(T));
  for_units(parallel, ceil_div(p.rows, block), [&](Units& units) {
    Forward<Norm, T, kAdds, kDrops> worker(p);
    int64_t unit;
    while (units.next(unit)) {
      const int64_t end = std::min(p.rows, (unit + 1) * block);
      for (int64_t r = unit * block; r < end; r += kRows) {
        worker.run(r, std::min<int64_t>(kRows, end - r));
      }
    }
  });
}

// ---- Backward

// Rows that backward takes side by side: of floats between 2 and 8 KB one, since L1 has room for
// it, dweight and dbias, and not for two (10% of the time, Sapphire Rapids).
template <typename T>
bool side_by_side(int64_t channels) {
  return sizeof(T) < sizeof(float) || channels <= 512 || channels > 2048;
}

// What one thread needs for it.
template <typename Norm, typename T, bool kDrops, bool kAddsGrad>
class Backward {
 public:
  explicit Backward(const NormGradParams& p)
      : p_(p),
        scratch_(Scratch::bytes<float>(p.channels) +
                 kRows * Scratch::bytes<uint16_t>(draw_space(p.channels))) {
    float* weight = scratch_.take<float>(p.channels);
    weight_ = parameter(p.weight, p.weight_dtype, 1.0f, p.channels, weight);
    for (auto& draws : draws_) draws = scratch_.take<uint16_t>(draw_space(p.channels));
  }

  // Writes dh and dx of rows [begin, end), adds their shares to dweight and dbias.
  void run(int64_t begin, int64_t end, float* dweight, float* dbias) const {
    int64_t r = begin;
    if (side_by_side<T>(p_.channels)) {
      for (; r + kRows <= end; r += kRows) run_rows<kRows>(r, dweight, dbias);
    }
    for (; r < end; ++r) run_rows<1>(r, dweight, dbias);
  }

 private:
  template <int kCount>
  void run_rows(int64_t first, float* dweight, float* dbias) const {
    const T *grad_out[kCount], *grad_sum[kCount], *h[kCount];
    T *dresidual[kCount], *dx[kCount];
    typename Norm::Gradient norms[kCount];
    for (int i = 0; i < kCount; ++i) {
      const int64_t r = first + i;
      grad_out[i] = row<T>(p_.grad_out, r);
      grad_sum[i] = kAddsGrad ? row<T>(p_.grad_sum, r) : nullptr;
      h[i] = row<T>(p_.sum, r);
      dresidual[i] = mutable_row<T>(p_.dresidual, r);
      dx[i] = kDrops ? mutable_row<T>(p_.dx, r) : nullptr;
      if constexpr (kDrops) draw(p_.dropout, p_.channels, r, draws_[i], grad_out[i], h[i]);
      norms[i] = measure(r, grad_out[i], h[i]);
    }
    const float* weight = weight_;
    const Dropout dropout = p_.dropout;
    for_vectors(0, p_.channels, [&](int64_t j, int64_t n, int) __attribute__((always_inline)) {
      const Vec w = load(weight + j, n);
      Vec dw = load(dweight + j), db = Norm::kHasBias ? load(dbias + j) : zero();
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) {
        const Vec g = load(grad_out[i] + j, n), x_hat = norms[i].normalised(load(h[i] + j, n));
        Vec dh = norms[i].dh(rounded_product(g, w), x_hat);
        if constexpr (kAddsGrad) {
          fetch<kReadAhead>(grad_sum[i] + j);
          dh += load(grad_sum[i] + j, n);
        }
        fetch<kWriteAhead>(dresidual[i] + j);
        store(dresidual[i] + j, dh, n);
        if constexpr (kDrops) {
          fetch<kWriteAhead>(dx[i] + j);
          store(dx[i] + j, drop(dh, draws_[i] + j, dropout.threshold, dropout.scale), n);
        }
        dw = fma(g, x_hat, dw);
        db += g;
      }
      store(dweight + j, dw);
      if constexpr (Norm::kHasBias) store(dbias + j, db);
    });
  }
  auto measure(int64_t r, const T* grad_out, const T* h) const {
    const float* weight = weight_;
    return Norm::Gradient::of_row(
        p_.channels, Norm::kHasMean ? p_.mean[r] : 0.0f, p_.rstd[r],
        [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          fetch<kReadAhead>(grad_out + j);
          return rounded_product(load(grad_out + j, n), load(weight + j, n));
        },
        [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          fetch<kReadAhead>(h + j);
          return load(h + j, n);
        });
  }

  const NormGradParams& p_;
  Scratch scratch_;
  const float* weight_;
  uint16_t* draws_[kRows];
};

template <typename Norm, typename T, bool kDrops, bool kAddsGrad>
void backward(const NormGradParams& p, const Parallel& parallel) {
  AffineGradient affine(p.rows, p.channels);
  affine.add_rows(parallel, unit_rows(p.channels, sizeof(T)),
                  [&] { return Backward<Norm, T, kDrops, kAddsGrad>(p); });
  affine.finish(parallel, p.dweight, p.dbias);
}

}  // namespace

void norm_fwd(const NormParams& p, const Parallel& parallel) {
  if (p.channels == 0) {  // rows without elements have no statistics
    if (p.mean) std::fill_n(p.mean, p.rows, 0.0f);
    if (p.rstd) std::fill_n(p.rstd, p.rows, 0.0f);
    return;
  }
  with_norm(p.norm, [&](auto norm) {
    with_storage(p.dtype, [&](auto storage) {
      with_flags(bool(p.residual), p.dropout.active(), [&](auto adds, auto drops) {
        forward<decltype(norm), decltype(storage), adds, drops>(p, parallel);
      });
    });
  });
}

void norm_bwd(const NormGradParams& p, const Parallel& parallel) {
  if (p.channels == 0) return;
  with_norm(p.norm, [&](auto norm) {
    with_storage(p.dtype, [&](auto storage) {
      with_flags(bool(p.dx), bool(p.grad_sum), [&](auto drops, auto adds_grad) {
        backward<decltype(norm), decltype(storage), drops, adds_grad>(p, parallel);
      });
    });
  });
}

}  // namespace ft::FT_ISA
