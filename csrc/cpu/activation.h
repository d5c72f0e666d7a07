// Activation functions and their derivatives on vectors.
#pragma once
#include <type_traits>

#include "../common/mlp.h"
#include "simd.h"

namespace ft::FT_ISA {

// e^x for any x: overflows to inf above 88.7, underflows to 0 below -87.
FT_INLINE Vec exp(Vec x) {
  // Split as 2^(2t) so that results between 2^127 and 2^128 are reached, and larger ones overflow.
  const Vec half = x * (0.5f * kLog2E);
  const Vec e = exp2(min(broadcast(100.0f), half));
  return e * e;
}

// 1 / (1 + e^-x)
FT_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// P(X <= x) for a standard normal X, and its density. The tail is erfc by Abramowitz and Stegun
// 7.1.26, absolute error 1.5e-7; it is computed from |x|, so neither side loses its leading digits.
struct Normal {
  Vec cdf, pdf;
};
FT_INLINE Normal normal(Vec x) {
  const Vec a = abs(x) * 0.70710678118654752f;
  const Vec t = 1.0f / fma(a, broadcast(0.3275911f), broadcast(1.0f));
  Vec p = fma(broadcast(1.061405429f), t, broadcast(-1.453152027f));
  p = fma(p, t, broadcast(1.421413741f));
  p = fma(p, t, broadcast(-0.284496736f));
  p = fma(p, t, broadcast(0.254829592f));
  const Vec gauss = exp2(a * a * -kLog2E);  // e^(-x²/2)
  const Vec tail = 0.5f * p * t * gauss;
  return {select(x >= 0.0f, 1.0f - tail, tail), 0.398942280401432678f * gauss};
}

inline constexpr float kGeluTanhScale = 0.79788456080286536f;  // sqrt(2 / pi)
inline constexpr float kGeluTanhCubic = 0.044715f;

template <Activation kActivation>
FT_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kGelu) {
    return x * normal(x).cdf;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2u)
    const Vec u = kGeluTanhScale * fma(kGeluTanhCubic * x * x, x, x);
    return x * sigmoid(2.0f * u);
  } else if constexpr (kActivation == Activation::kRelu) {
    return max(zero(), x);  // in this order a NaN stays one
  } else if constexpr (kActivation == Activation::kSilu) {
    return x * sigmoid(x);
  } else {
    return x;
  }
}

template <Activation kActivation>
FT_INLINE Vec activation_gradient(Vec x) {
  if constexpr (kActivation == Activation::kGelu) {
    const Normal n = normal(x);
    return fma(x, n.pdf, n.cdf);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const Vec x2 = x * x;
    const Vec u = kGeluTanhScale * fma(kGeluTanhCubic * x2, x, x);
    const Vec s = sigmoid(2.0f * u);
    const Vec du = kGeluTanhScale * fma(broadcast(3.0f * kGeluTanhCubic), x2, broadcast(1.0f));
    return fma(2.0f * x * du, s * (1.0f - s), s);
  } else if constexpr (kActivation == Activation::kRelu) {
    return select(x > 0.0f, broadcast(1.0f), zero());
  } else if constexpr (kActivation == Activation::kSilu) {
    const Vec s = sigmoid(x);
    return fma(x, s * (1.0f - s), s);
  } else {
    return broadcast(1.0f);
  }
}

// Calls `f` with the activation as a compile-time constant.
template <typename F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kIdentity:
      return f(std::integral_constant<Activation, Activation::kIdentity>());
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>());
  }
}

}  // namespace ft::FT_ISA
