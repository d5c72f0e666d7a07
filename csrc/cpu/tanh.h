// The hyperbolic tangent, of which softcap is made.
#pragma once
#include "simd.h"

namespace ft::FT_ISA {

// tanh: an odd polynomial below 0.625, 1 - 2 / (e^2x + 1) above (both as in Cephes); 1 ulp or two.
FT_INLINE Vec tanh(Vec x) {
  const Vec z = x * x, a = min(broadcast(10.0f), abs(x));
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec near = fma(p * z, x, x);
  const Vec shifted = fma(a, broadcast(2.0f * kLog2E), broadcast(kExp2Magic));
  const Vec f = fma(a, broadcast(2.0f * kLog2E), kExp2Magic - shifted);
  const Vec e = exp2_fraction<6>(f) * as<Vec>(as<UVec>(shifted) << 23);
  const Vec far = 1.0f - 2.0f / (e + 1.0f);
  const Vec signed_far = as<Vec>(as<UVec>(far) | (as<UVec>(x) & 0x80000000u));
  return select(abs(x) < 0.625f, near, signed_far);
}

}  // namespace ft::FT_ISA
