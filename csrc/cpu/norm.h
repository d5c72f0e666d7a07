// LayerNorm (Ba et al. 2016) and RmsNorm (Zhang and Sennrich 2019) of one row and its gradient:
// what the kernels of norm.cpp take as their template parameter `Norm`. Another norm is another
// class with the same members.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/norm.h"
#include "simd.h"

namespace ft::FT_ISA {

// Calls `body(j, n, lane)` for every vector of columns [begin, end): n of its elements exist, and
// `lane`, below kAccumulators, says which accumulator to use, so that additions do not wait for
// each other.
inline constexpr int kAccumulators = 4;
template <typename Body>
FT_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + kAccumulators * kWidth <= end; j += kAccumulators * kWidth) {
    body(j, kWidth, 0);
    body(j + kWidth, kWidth, 1);
    body(j + 2 * kWidth, kWidth, 2);
    body(j + 3 * kWidth, kWidth, 3);
  }
  for (; j + kWidth <= end; j += kWidth) body(j, kWidth, 0);
  if (j < end) body(j, end - j, 0);
}

// kCount means over a row. `body(j, n, sums)` adds one vector's share to sums[0 … kCount).
// A float accumulator takes kSteps values at most, and a double takes the accumulators: equal
// values (dropped ones) round the same way every time, so errors grow with the number of steps.
template <int kCount>
struct RowMeans {
  double of[kCount] = {};
};
template <int kCount, typename Body>
FT_INLINE RowMeans<kCount> row_means(int64_t channels, const Body& body) {
  constexpr int64_t kSteps = 16, kColumns = kSteps * kAccumulators * kWidth;
  const double share = 1.0 / static_cast<double>(channels);
  RowMeans<kCount> means;
  for (int64_t begin = 0; begin < channels; begin += kColumns) {
    Vec sums[kAccumulators][kCount] = {};
    for_vectors(begin, std::min(channels, begin + kColumns),
                [&](int64_t j, int64_t n, int lane)
                    __attribute__((always_inline)) { body(j, n, sums[lane]); });
    for (int i = 0; i < kCount; ++i) {
      means.of[i] += sum((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i])) * share;
    }
  }
  return means;
}

// A product rounded like any value: the compiler cannot see through the empty instruction, and so
// fuses nothing into it. It meets a sum of such products later, and in a row of one they must
// cancel.
FT_INLINE Vec rounded_product(Vec a, Vec b) {
  Vec product = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#else
  asm("" : "+w"(product));
#endif
  return product;
}

// The lanes of x that exist; the others zero.
FT_INLINE Vec only(Vec x, int64_t n) { return n >= kWidth ? x : select(lanes_below(n), x, zero()); }

class LayerNorm {
 public:
  static constexpr bool kHasMean = true, kHasBias = true;

  // Statistics of a row, in one pass over shifted data (Chan, Golub and LeVeque 1983): `first(j,
  // n)` makes a vector of it, `again(j, n)` gives it once more. Sums are taken around `shift_`, the
  // mean of the first vector: as long as that lies within one standard deviation of the mean, E[d²]
  // - E[d]² loses no more than a bit, whatever the mean is. Where it does not, sums are taken again
  // around the mean.
  template <typename First, typename Again>
  static FT_INLINE LayerNorm of_row(int64_t channels, float eps, const First& first,
                                    const Again& again) {
    const int64_t sample = std::min<int64_t>(kWidth, channels);
    LayerNorm norm;
    norm.shift_ = sum(first(0, sample)) / static_cast<float>(sample);
    double variance = norm.around_shift(channels, first);
    if (norm.rest_ * norm.rest_ > variance) [[unlikely]] {
      norm.shift_ += norm.rest_;
      variance = norm.around_shift(channels, again);
    }
    // In this order a NaN stays one.
    norm.rstd_ = 1.0f / std::sqrt(std::max(static_cast<float>(variance), 0.0f) + eps);
    return norm;
  }

  float mean() const { return shift_ + rest_; }
  float rstd() const { return rstd_; }
  // x̂ = (h - mean) rstd
  FT_INLINE Vec normalised(Vec h) const {
    return fma(h - shift_, broadcast(rstd_), broadcast(-rest_ * rstd_));
  }

  // dh = rstd (g - mean(g) - x̂ mean(g x̂)) of one row, where g is the gradient of x̂.
  class Gradient {
   public:
    // `g(j, n)` and `h(j, n)` are vectors of the row. The saved mean was rounded: the mean of x̂ is
    // what that left over, and is taken off again.
    template <typename G, typename H>
    static FT_INLINE Gradient of_row(int64_t channels, float mean, float rstd, const G& g,
                                     const H& h) {
      Gradient norm;
      norm.mean_ = mean;
      norm.rstd_ = rstd;
      const auto means =
          row_means<3>(channels, [&](int64_t j, int64_t n, Vec* s) __attribute__((always_inline)) {
            const Vec gradient = g(j, n), x_hat = only(norm.normalised(h(j, n)), n);
            s[0] += gradient;
            s[1] = fma(gradient, x_hat, s[1]);
            s[2] += x_hat;
          });
      const double of_g = means.of[0], of_x_hat = means.of[2];
      norm.rest_ = static_cast<float>(of_x_hat);
      norm.of_g_ = static_cast<float>(of_g);
      norm.of_g_x_hat_ = static_cast<float>(means.of[1] - of_x_hat * of_g);
      return norm;
    }

    FT_INLINE Vec normalised(Vec h) const {
      return fma(h - mean_, broadcast(rstd_), broadcast(-rest_));
    }
    FT_INLINE Vec dh(Vec g, Vec x_hat) const { return (g - of_g_ - x_hat * of_g_x_hat_) * rstd_; }

   private:
    float mean_ = 0, rstd_ = 0;
    float rest_ = 0, of_g_ = 0, of_g_x_hat_ = 0;  // means over the row of x̂, g and g x̂
  };

 private:
  // Sets `rest_`, returns the variance.
  template <typename H>
  FT_INLINE double around_shift(int64_t channels, const H& h) {
    const auto means =
        row_means<2>(channels, [&](int64_t j, int64_t n, Vec* s) __attribute__((always_inline)) {
          const Vec d = only(h(j, n) - shift_, n);
          s[0] += d;
          s[1] = fma(d, d, s[1]);
        });
    rest_ = static_cast<float>(means.of[0]);
    return means.of[1] - means.of[0] * means.of[0];
  }

  float shift_ = 0, rest_ = 0, rstd_ = 0;  // the mean is shift_ + rest_
};

class RmsNorm {
 public:
  static constexpr bool kHasMean = false, kHasBias = false;

  template <typename First, typename Again>
  static FT_INLINE RmsNorm of_row(int64_t channels, float eps, const First& first, const Again&) {
    const auto means =
        row_means<1>(channels, [&](int64_t j, int64_t n, Vec* s) __attribute__((always_inline)) {
          const Vec h = first(j, n);  // lanes beyond the row are zero
          s[0] = fma(h, h, s[0]);
        });
    RmsNorm norm;
    norm.rstd_ = static_cast<float>(1.0 / std::sqrt(means.of[0] + static_cast<double>(eps)));
    return norm;
  }

  float rstd() const { return rstd_; }
  FT_INLINE Vec normalised(Vec h) const { return h * rstd_; }

  // dh = rstd (g - x̂ mean(g x̂)) of one row, where g is the gradient of x̂.
  class Gradient {
   public:
    template <typename G, typename H>
    static FT_INLINE Gradient of_row(int64_t channels, float, float rstd, const G& g, const H& h) {
      Gradient norm;
      norm.rstd_ = rstd;
      const auto means =
          row_means<1>(channels, [&](int64_t j, int64_t n, Vec* s) __attribute__((always_inline)) {
            s[0] = fma(g(j, n), norm.normalised(h(j, n)), s[0]);
          });
      norm.of_g_x_hat_ = static_cast<float>(means.of[0]);
      return norm;
    }

    FT_INLINE Vec normalised(Vec h) const { return h * rstd_; }
    FT_INLINE Vec dh(Vec g, Vec x_hat) const { return (g - x_hat * of_g_x_hat_) * rstd_; }

   private:
    float rstd_ = 0, of_g_x_hat_ = 0;
  };

 private:
  float rstd_ = 0;
};

// Calls `f` with a value of the class.
template <typename F>
void with_norm(NormKind kind, const F& f) {
  if (kind == NormKind::kRms) return f(RmsNorm{});
  f(LayerNorm{});
}

}  // namespace ft::FT_ISA
