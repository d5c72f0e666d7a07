// One row of the online softmax (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022).
//
// A row is met one block of keys at a time. With x = factor * score in the log2 domain, a row's
// state holds the largest score m and the sum of 2^(x - factor * m) over the keys met so far. When
// a block raises m, what was gathered before is scaled down by `meet`. The exponent is computed
// as factor * (score - m), which is exactly 0 for the largest however huge it is.
#pragma once
#include "simd.h"

namespace ft::FT_ISA {

struct SoftmaxState {
  float maximum = -INFINITY;
  float total = 0.0f;

  // What is subtracted from a score: 0 while nothing was met, since -inf - -inf is NaN.
  float shift() const { return maximum == -INFINITY ? 0.0f : maximum; }
  // Meets a block whose largest score is `top`. Returns what all that was gathered before must be
  // multiplied by: 1 almost always.
  float meet(float top, double factor) {
    if (!(top > maximum)) return 1.0f;
    // nothing was met before a first block, also where factor is 0
    const float rescale = maximum == -INFINITY
                              ? 0.0f
                              : static_cast<float>(std::exp2((double{maximum} - top) * factor));
    maximum = top;
    total *= rescale;
    return rescale;
  }
  // Natural logarithm of the sum of exponentials; -inf where no key was met.
  float logsumexp(double factor) const {
    if (total == 0.0f) return -INFINITY;
    return static_cast<float>((maximum * factor + double{std::log2(total)}) *
                              0.693147180559945309417);
  }
};

// x / total, as good as rounded once: what the product with 1 / total has missed is put back.
struct Quotient {
  Vec total, reciprocal;

  // Of zeros alone where nothing was met.
  explicit Quotient(float total)
      : total(broadcast(total)), reciprocal(broadcast(total == 0.0f ? 0.0f : 1.0f / total)) {}
  FT_INLINE Vec operator()(Vec x) const {
    const Vec q = x * reciprocal;
    return fma(x - q * total, reciprocal, q);
  }
  // Of infinities too.
  FT_INLINE Vec of_any(Vec x) const {
    const Vec q = (*this)(x);
    return select(as<IVec>(q == q), q, x * reciprocal);
  }
};

// 2^(factor * d) for exponents up to kBound, -inf included; 0 below 2^-126. Where degree 6 is asked
// for, the factor is taken to twice float's precision: its own rounding would bend all
// probabilities the same way.
template <int kDegree>
struct Power {
  Vec factor, rest, least;

  explicit Power(double f)
      : factor(broadcast(static_cast<float>(f))),
        rest(broadcast(static_cast<float>(f - static_cast<float>(f)))),
        least(broadcast(f < 0x1p-100 ? -0x1p126f : static_cast<float>(-127.0 / f))) {}

#if defined(__AVX512F__)
  FT_INLINE Vec operator()(Vec d) const {
    const Vec t = d * factor;
    // a NaN is not less
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const Vec n = (Vec)_mm512_maskz_roundscale_ps(normal, (__m512)t, kNearest);
    Vec f = d * factor - n;
    if constexpr (kDegree > 4) f = fma(d, rest, f);
    return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)exp2_fraction<kDegree>(f), (__m512)n);
  }
#else
  FT_INLINE Vec operator()(Vec d) const {
    d = max(least, d);
    const Vec shifted = fma(d, factor, broadcast(kExp2Magic));
    Vec f = fma(d, factor, kExp2Magic - shifted);
    if constexpr (kDegree > 4) f = fma(d, rest, f);
    return exp2_fraction<kDegree>(f) * as<Vec>(as<UVec>(shifted) << 23);
  }
#endif
};

// 2^(factor * score) * kBoundedScale, rounded as `Power` rounds, which backward takes. No exponent
// is larger than kBound, so that nothing has to be subtracted. Probabilities are then 2^-48 to
// 2^16, which leaves room for values from kLeastValue to kMostValue in their sums.
#if defined(__FMA__) || defined(__aarch64__)
inline constexpr double kBound = 32.0;
#else  // without a fused multiply-add the exponent would be rounded, that of the largest score too
inline constexpr double kBound = 0.0;
#endif
inline constexpr float kBoundedScale = 0x1p-16f;
inline constexpr float kLeastValue = 0x1p-40f, kMostValue = 0x1p60f;
template <int kDegree>
struct BoundedPower {
  Vec factor, rest;

  explicit BoundedPower(double f)
      : factor(broadcast(static_cast<float>(f))),
        rest(broadcast(static_cast<float>(f - static_cast<float>(f)))) {}

  FT_INLINE Vec operator()(Vec score) const {
#if defined(__AVX512F__)
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const auto t = (__m512)(score * factor);
    const Vec n = (Vec)_mm512_maskz_roundscale_ps(kAllLanes, t, kNearest);
    Vec f = score * factor - n;
#else
    const Vec shifted = fma(score, factor, broadcast(kExp2Magic));
    Vec f = fma(score, factor, kExp2Magic - shifted);
#endif
    if constexpr (kDegree > 4) f = fma(score, rest, f);
    const Vec p = exp2_fraction<kDegree>(f, kBoundedScale);
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)n);
#else
    return p * as<Vec>(as<UVec>(shifted) << 23);
#endif
  }
};

// Where probabilities become pairs of bf16, fewer terms are as good.
template <typename D>
inline constexpr int kPowerDegree = D::kPerLane == 2 ? 4 : 6;

// The largest of the first n scores, lane by lane.
FT_INLINE Vec largest(const float* scores, int64_t n) {
  Vec top = broadcast(-INFINITY), top2 = top;
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    top = max(top, load(scores + j));
    top2 = max(top2, load(scores + j + kWidth));
  }
  for (; j < n; j += kWidth) {
    top = max(top, select(lanes_below(n - j), load(scores + j), broadcast(-INFINITY)));
  }
  return max(top, top2);
}

// to[j] = 2^(factor * (scores[j] - shift)) for j < n, and zeros up to the next kWidth. `to` may be
// `scores`. Returns the sum, lane by lane.
template <int kDegree, typename T>
FT_INLINE Vec exponentials(const float* scores, int64_t n, float shift, const Power<kDegree>& power,
                           T* to) {
  const Vec s = broadcast(shift);
  Vec total = zero(), total2 = zero();
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    const Vec p = power(load(scores + j) - s), p2 = power(load(scores + j + kWidth) - s);
    store_pair(to + j, p, p2);
    total = total + p;
    total2 = total2 + p2;
  }
  for (; j < n; j += kWidth) {
    const Vec p = select(lanes_below(n - j), power(load(scores + j) - s), zero());
    store(to + j, p);
    total = total + p;
  }
  return total + total2;
}

}  // namespace ft::FT_ISA
