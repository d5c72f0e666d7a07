// Activation functions and their derivatives on vectors.
//
// Each comes in two qualities: about 1 ulp of float, and an error under a fifth of bf16's rounding
// for what is rounded to bf16 at once. Neither loses digits in the tails, and inf, NaN and numbers
// whose square overflows give what the formula gives.
#pragma once
#include <type_traits>

#include "../common/mlp.h"
#include "simd.h"

namespace ft::FT_ISA {

// Whether results of element type T are made in the lesser quality.
template <typename T>
inline constexpr bool kRoundedToBFloat16 = std::is_same_v<T, bf16>;

// The integer nearest to |x| < 2^22.
FT_INLINE Vec nearest(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)x,
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + 0x1.8p23f) - 0x1.8p23f;
#endif
}
// p * 2^n for an integer n of -252…254, also where 2^n alone is no normal float.
FT_INLINE Vec times_power(Vec p, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)n);
#else
  const IVec all = __builtin_convertvector(n, IVec), half = all >> 1, rest = all - half;
  return p * as<Vec>((half + 127) << 23) * as<Vec>((rest + 127) << 23);
#endif
}
// 2^f for |f| <= 1/2: relative error 2e-9 or 7.5e-5 before rounding (minimax).
template <bool kRough>
FT_INLINE Vec exp2_of_fraction(Vec f) {
  Vec p;
  if constexpr (kRough) {
    p = fma(broadcast(5.517161319e-02f), f, broadcast(2.426111179e-01f));
    p = fma(p, f, broadcast(6.932609958e-01f));
    return fma(p, f, broadcast(9.999280741e-01f));
  } else {
    p = fma(broadcast(1.534581146e-04f), f, broadcast(1.339993121e-03f));
    p = fma(p, f, broadcast(9.618488959e-03f));
    p = fma(p, f, broadcast(5.550328777e-02f));
    p = fma(p, f, broadcast(2.402264689e-01f));
    p = fma(p, f, broadcast(6.931472057e-01f));
    return fma(p, f, broadcast(1.0f));
  }
}

// 2^x for -252 <= x <= 0.
template <bool kRough>
FT_INLINE Vec exp2_of_negative(Vec x) {
  const Vec n = nearest(x);
  return times_power(exp2_of_fraction<kRough>(x - n), n);
}
// e^x for any x: overflows to inf above 88.7, underflows to 0 below -104.
template <bool kRough>
FT_INLINE Vec exp(Vec x) {
  x = max(broadcast(-104.0f), min(broadcast(89.0f), x));  // in this order a NaN stays one
  const Vec n = nearest(x * kLog2E);
  Vec f;
  if constexpr (kRough) {
    f = fma(x, broadcast(kLog2E), -n);
  } else {  // x - n ln 2, with ln 2 in two parts of which the first has so few bits that n times it
            // is exact (Cody and Waite)
    f = kLog2E * ((x - n * 0.693359375f) - n * -2.12194440e-4f);
  }
  return times_power(exp2_of_fraction<kRough>(f), n);
}

// P(X <= -a) for a standard normal X and 0 <= a <= kTailEnd, where it is 0 in float. It is made as
// 2^q: the logarithm is so smooth that a polynomial holds on all of the tail (minimax, weighted by
// the square or the fourth root of P; from the interval's end at 6 or 5 on it falls ever faster).
// Absolute error 4e-9 and relative 6e-7 up to a = 4; or relative 4e-5 at 0, 5e-4 at 4.
template <bool kRough>
inline constexpr float kTailEnd = kRough ? 14.0f : 12.0f;
template <bool kRough>
FT_INLINE Vec normal_tail(Vec a) {
  Vec q;
  if constexpr (kRough) {
    q = fma(broadcast(-3.386054471e-04f), a, broadcast(6.054840617e-03f));
    q = fma(q, a, broadcast(-4.917330391e-02f));
    q = fma(q, a, broadcast(-4.626412200e-01f));
    q = fma(q, a, broadcast(-1.149948660e+00f));
    q = fma(q, a, broadcast(-1.000059560e+00f));
  } else {
    q = fma(broadcast(-3.375107399e-08f), a, broadcast(9.580985921e-07f));
    q = fma(q, a, broadcast(-1.175318930e-05f));
    q = fma(q, a, broadcast(7.949278226e-05f));
    q = fma(q, a, broadcast(-2.851902280e-04f));
    q = fma(q, a, broadcast(2.309225851e-06f));
    q = fma(q, a, broadcast(6.953674530e-03f));
    q = fma(q, a, broadcast(-5.245119734e-02f));
    q = fma(q, a, broadcast(-4.592161714e-01f));
    q = fma(q, a, broadcast(-1.151104881e+00f));
    q = fma(q, a, broadcast(-1.0f));
  }
  return exp2_of_negative<kRough>(q);
}
// The density at a.
template <bool kRough>
FT_INLINE Vec normal_density(Vec a) {
  a = min(broadcast(16.0f), a);  // it is 0 in float
  return 0.398942280401432678f * exp2_of_negative<kRough>(a * a * (-0.5f * kLog2E));
}

// s = 1 / (1 + e^-x) and its derivative s (1 - s), which loses no digits where s is near 1. For
// |x| < 88.
struct Sigmoid {
  Vec value, slope;
};
template <bool kRough>
FT_INLINE Sigmoid sigmoid(Vec x) {
  const Vec e = exp<kRough>(-x), s = 1.0f / (1.0f + e);
  return {s, s * (e * s)};
}

inline constexpr float kGeluTanhScale = 0.79788456080286536f;  // sqrt(2 / pi)
inline constexpr float kGeluTanhCubic = 0.044715f;

template <Activation kActivation, typename T>
FT_INLINE Vec activate(Vec x) {
  constexpr bool kRough = kRoundedToBFloat16<T>;
  if constexpr (kActivation == Activation::kGelu) {
    // x P(X <= x), with P = 1 - tail for positive x
    const Vec a = min(broadcast(kTailEnd<kRough>), abs(x));
    return fma(-a, normal_tail<kRough>(a), max(zero(), x));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2u)
    const Vec u = kGeluTanhScale * fma(kGeluTanhCubic * x * x, x, x);
    return x / (1.0f + exp<kRough>(-2.0f * u));
  } else if constexpr (kActivation == Activation::kRelu) {
    return max(zero(), x);  // in this order a NaN stays one
  } else if constexpr (kActivation == Activation::kSilu) {
    return x / (1.0f + exp<kRough>(-x));
  } else {
    return x;
  }
}

// The activation and its derivative, which have their exponentials in common.
struct ValueAndSlope {
  Vec value, slope;
};
template <Activation kActivation, typename T>
FT_INLINE ValueAndSlope activation_and_slope(Vec x) {
  constexpr bool kRough = kRoundedToBFloat16<T>;
  if constexpr (kActivation == Activation::kGelu) {
    const Vec a = min(broadcast(kTailEnd<kRough>), abs(x)), tail = normal_tail<kRough>(a);
    const Vec p = select(x >= 0.0f, 1.0f - tail, tail);
    return {fma(-a, tail, max(zero(), x)), fma(x, normal_density<kRough>(abs(x)), p)};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const Vec near = max(broadcast(-9.0f), min(broadcast(9.0f), x));  // beyond, it is 0 or 1
    const Vec x2 = near * near;
    const Vec u = kGeluTanhScale * fma(kGeluTanhCubic * x2, near, near);
    const Sigmoid s = sigmoid<kRough>(2.0f * u);
    const Vec du = kGeluTanhScale * fma(broadcast(3.0f * kGeluTanhCubic), x2, broadcast(1.0f));
    return {x * s.value, fma(2.0f * near * du, s.slope, s.value)};
  } else if constexpr (kActivation == Activation::kRelu) {
    return {max(zero(), x), select(x > 0.0f, broadcast(1.0f), zero())};
  } else if constexpr (kActivation == Activation::kSilu) {
    const Vec near = max(broadcast(-87.0f), min(broadcast(87.0f), x));  // beyond, it is 0 or 1
    const Sigmoid s = sigmoid<kRough>(near);
    return {x * s.value, fma(near, s.slope, s.value)};
  } else {
    return {x, broadcast(1.0f)};
  }
}
template <Activation kActivation, typename T>
FT_INLINE Vec activation_gradient(Vec x) {
  return activation_and_slope<kActivation, T>(x).slope;
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
