// AdamW (Loshchilov and Hutter 2019) on a group of tensors in one pass, and the sum of squares of
// their gradients, for clipping:
//     m = β₁ m + (1 - β₁) g    v = β₂ v + (1 - β₂) g²    p = p - λ p - s m / (√v c + ε)
// Reads p, g, m and v and writes p, m and v, 28 bytes an element in float32, for about 12 FLOPs, a
// square root and a division; the sum of squares reads g. Bytes are the cost.
//
// The tensors lie end to end on a line, which is cut into units: hundreds of small ones share one.
#include "../common/adamw.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace ft::FT_ISA {
namespace {

// Elements of a unit. Waking a thread takes about as long as moving a tenth of it.
constexpr int64_t kUnit = 16384;
// On the line tensors start at multiples of this, so that units never cut a cache line in two.
constexpr int64_t kAlign = 64;

// Tensors that have a `count`, end to end.
template <typename Run>
class Line {
 public:
  Line(const Run* runs, int64_t run_count)
      : runs_(runs), run_count_(run_count), scratch_(Scratch::bytes<int64_t>(run_count + 1)) {
    starts_ = scratch_.take<int64_t>(run_count + 1);
    starts_[0] = 0;
    for (int64_t i = 0; i < run_count; ++i) {
      starts_[i + 1] = starts_[i] + round_up(runs[i].count, kAlign);
    }
  }
  int64_t units() const { return ceil_div(starts_[run_count_], kUnit); }

  // Calls `body(run, begin, end)` for every stretch of a tensor that lies in this unit, in order.
  template <typename Body>
  void for_stretches(int64_t unit, const Body& body) const {
    const int64_t first = unit * kUnit, last = first + kUnit;
    // The tensor that `first` lies in: the last one that starts there or before.
    int64_t i = std::upper_bound(starts_, starts_ + run_count_ + 1, first) - starts_ - 1;
    for (; i < run_count_ && starts_[i] < last; ++i) {
      const int64_t begin = std::max<int64_t>(0, first - starts_[i]);
      const int64_t end = std::min(runs_[i].count, last - starts_[i]);
      if (begin < end) body(runs_[i], begin, end);
    }
  }

 private:
  const Run* runs_;
  const int64_t run_count_;
  Scratch scratch_;
  int64_t* starts_;
};

// ---- Sum of squares

// Squares of float32 are exact in double, and so many of them can be added that nothing is lost.
class Squares {
 public:
  template <typename T>
  FT_INLINE void add(const T* x, int64_t count) {
    int64_t j = 0;
    for (; j + 2 * kWidth <= count; j += 2 * kWidth) {
      add(load(x + j), 0);
      add(load(x + j + kWidth), 2);
    }
    for (; j < count; j += kWidth) add(load(x + j, std::min<int64_t>(kWidth, count - j)), 0);
  }
  double total() const {
    const DVec all = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
    double total = 0;
    for (int i = 0; i < kWidth / 2; ++i) total += all[i];
    return total;
  }

 private:
  FT_INLINE void add(Vec x, int at) {
    const Doubles d = to_double(x);
    sums_[at] += d.low * d.low;
    sums_[at + 1] += d.high * d.high;
  }
  DVec sums_[4] = {};
};

// ---- The step

// β as two floats, since 1 / (1 - β₂) turns the rounding of a float 0.999 into 1e-5 of v. The lower
// one is above zero too, so that an infinite v stays infinite.
struct Split {
  explicit Split(double x) : high(static_cast<float>(x)) {
    if (high >= x) high = std::nextafter(high, 0.0f);
    low = static_cast<float>(x - high);
  }
  float high, low;
  FT_INLINE Vec times(Vec x, Vec plus) const {
    return fma(broadcast(high), x, fma(broadcast(low), x, plus));
  }
};

// m / (√v c + ε). Square root and division would take twice as long as all else together, and where
// there are estimates, one Newton step on each of them errs by less than a rounding: 2⁻²⁸. What
// comes out infinite or NaN is taken again in the long way, for the step does not hold there.
FT_INLINE Vec ratio(Vec m, Vec v, float c, float eps) {
#if defined(__AVX512F__)
  const Vec y = estimate_reciprocal_sqrt(v), s = v * y;
  const Vec root = fma(v - s * s, 0.5f * y, s);
  const Vec d = fma(root, broadcast(c), broadcast(eps));
  const Vec r = estimate_reciprocal(d), q = m * r;
  const Vec quotient = fma(m - q * d, r, q);
  if (all_finite(quotient)) [[likely]]
    return quotient;
#endif
  return m / fma(sqrt(v), broadcast(c), broadcast(eps));
}

template <typename T, bool kAmsgrad>
class Step {
 public:
  explicit Step(const AdamWParams& p)
      : beta1_(p.beta1),
        beta2_(p.beta2),
        rest1_(static_cast<float>(1 - p.beta1)),
        rest2_(static_cast<float>(1 - p.beta2)),
        grad_scale_(p.grad_scale),
        decay_(p.decay),
        eps_(p.eps) {}

  void run(const AdamWRun& t, int64_t begin, int64_t end) const {
    int64_t j = begin;
    for (; j + kWidth <= end; j += kWidth) update(t, j, kWidth);
    if (j < end) update(t, j, end - j);
  }

 private:
  // Elements [j, j + n), n at most a vector.
  FT_INLINE void update(const AdamWRun& t, int64_t j, int64_t n) const {
    T *param = static_cast<T*>(t.param) + j, *exp_avg = static_cast<T*>(t.exp_avg) + j;
    T* exp_avg_sq = static_cast<T*>(t.exp_avg_sq) + j;
    const Vec g = load(static_cast<const T*>(t.grad) + j, n) * grad_scale_;
    const Vec m = beta1_.times(load(exp_avg, n), rest1_ * g);
    const Vec v = beta2_.times(load(exp_avg_sq, n), rest2_ * g * g);
    store(exp_avg, m, n);
    store(exp_avg_sq, v, n);
    Vec largest = v;
    if constexpr (kAmsgrad) {
      T* max_exp_avg_sq = static_cast<T*>(t.max_exp_avg_sq) + j;
      const Vec before = load(max_exp_avg_sq, n);
      largest = select(before != before, before, max(before, v));
      store(max_exp_avg_sq, largest, n);
    }
    const Vec p = load(param, n);
    const Vec step = t.step_size * ratio(m, largest, t.correction, eps_);
    store(param, p - fma(broadcast(decay_), p, step), n);
  }

  const Split beta1_, beta2_;
  const float rest1_, rest2_;  // 1 - β
  const float grad_scale_, decay_, eps_;
};

}  // namespace

double sum_of_squares(const SquaresParams& p, const Parallel& parallel) {
  const Line line(p.tensors, p.tensor_count);
  const int64_t units = line.units();
  Scratch scratch(Scratch::bytes<double>(units));
  double* partial = scratch.take<double>(units);
  for_units(parallel, units, [&](Units& mine) {
    int64_t unit;
    while (mine.next(unit)) {
      Squares squares;
      line.for_stretches(unit, [&](const GradientRun& t, int64_t begin, int64_t end) {
        with_storage(t.dtype, [&](auto storage) {
          squares.add(static_cast<const decltype(storage)*>(t.data) + begin, end - begin);
        });
      });
      partial[unit] = squares.total();
    }
  });
  double total = 0;
  for (int64_t i = 0; i < units; ++i) total += partial[i];
  return total;
}

void adamw(const AdamWParams& p, const Parallel& parallel) {
  const Line line(p.tensors, p.tensor_count);
  for_units(parallel, line.units(), [&](Units& mine) {
    int64_t unit;
    while (mine.next(unit)) {
      line.for_stretches(unit, [&](const AdamWRun& t, int64_t begin, int64_t end) {
        with_storage(t.dtype, [&](auto storage) {
          using T = decltype(storage);
          t.max_exp_avg_sq ? Step<T, true>(p).run(t, begin, end)
                           : Step<T, false>(p).run(t, begin, end);
        });
      });
    }
  });
}

}  // namespace ft::FT_ISA
