// LayerNorm (Ba et al. 2016) of one row and its gradient: what the kernels of norm.cpp take as their
// template parameter `Norm`. Another norm is another class with the same members.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

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

// kCount sums over a row. `body(j, n, sums)` adds one vector's share to sums[0 … kCount).
// A float accumulator takes kSteps values at most, and a double takes the accumulators: equal values
// (dropped ones) round the same way every time, so errors grow with the number of steps.
template <int kCount>
struct RowSums {
  double of[kCount] = {};
};
template <int kCount, typename Body>
FT_INLINE RowSums<kCount> row_sums(int64_t channels, const Body& body) {
  constexpr int64_t kSteps = 16, kColumns = kSteps * kAccumulators * kWidth;
  RowSums<kCount> total;
  for (int64_t begin = 0; begin < channels; begin += kColumns) {
    Vec sums[kAccumulators][kCount] = {};
    for_vectors(begin, std::min(channels, begin + kColumns),
                [&](int64_t j, int64_t n, int lane)
                    __attribute__((always_inline)) { body(j, n, sums[lane]); });
    for (int i = 0; i < kCount; ++i) {
      total.of[i] += sum((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
    }
  }
  return total;
}

// A product rounded like any value: the compiler cannot see through the empty instruction, and so
// fuses nothing into it. It meets a sum of such products later, and in a row of one they must cancel.
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
FT_INLINE Vec only(Vec x, int64_t n) {
  return n >= kWidth ? x : select(lanes_below(n), x, zero());
}

class LayerNorm {
 public:
  // Statistics of h, whose sum is known, in two passes: the mean, then centred squares. What the
  // centred values still sum to (`rest_`) is what rounding took from the mean; with it, a mean
  // thousands of deviations away from zero costs no accuracy.
  template <typename T>
  static FT_INLINE LayerNorm of_row(const T* h, int64_t channels, double total, float eps) {
    LayerNorm norm;
    norm.mean_ = static_cast<float>(total / channels);
    const auto sums = row_sums<2>(
        channels, [&](int64_t j, int64_t n, Vec* s) __attribute__((always_inline)) {
          const Vec centred = only(load(h + j, n) - norm.mean_, n);
          s[0] += centred;
          s[1] = fma(centred, centred, s[1]);
        });
    norm.rest_ = static_cast<float>(sums.of[0] / channels);
    const float variance = static_cast<float>(sums.of[1] / channels) - norm.rest_ * norm.rest_;
    norm.rstd_ = 1.0f / std::sqrt(std::max(variance, 0.0f) + eps);  // this order keeps a NaN
    return norm;
  }

  float mean() const { return mean_ + rest_; }
  float rstd() const { return rstd_; }
  // x̂ = (h - mean) rstd
  FT_INLINE Vec normalised(Vec h) const {
    return fma(h - mean_, broadcast(rstd_), broadcast(-rest_ * rstd_));
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
      const auto sums = row_sums<3>(
          channels, [&](int64_t j, int64_t n, Vec* s) __attribute__((always_inline)) {
            const Vec gradient = g(j, n), x_hat = only(norm.normalised(h(j, n)), n);
            s[0] += gradient;
            s[1] = fma(gradient, x_hat, s[1]);
            s[2] += x_hat;
          });
      const double of_g = sums.of[0] / channels, of_x_hat = sums.of[2] / channels;
      norm.rest_ = static_cast<float>(of_x_hat);
      norm.of_g_ = static_cast<float>(of_g);
      norm.of_g_x_hat_ = static_cast<float>(sums.of[1] / channels - of_x_hat * of_g);
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
  float mean_ = 0, rest_ = 0, rstd_ = 0;
};

}  // namespace ft::FT_ISA
