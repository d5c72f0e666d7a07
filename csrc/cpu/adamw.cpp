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
#include <limits>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace ft::FT_ISA {
namespace {

// Elements of a unit. Waking a thread takes about as long as moving a tenth of it.
constexpr int64_t kUnit = 16384;
// On the line tensors start at multiples of this, so that units never cut a cache line in two.
constexpr int64_t kAlign = 64;

// The processor's own prefetching stops at every page and follows few streams at a time. Asking for
// lines this far ahead of their use takes a fifth off the time of a step beyond the caches, a third
// in bfloat16, and a tenth in L3 (Sapphire Rapids).
constexpr int64_t kAheadBytes = 2048;
template <int kVectors, typename... T>
FT_INLINE void fetch_ahead(const T*... at) {
  const auto fetch = [](const auto* p) __attribute__((always_inline)) {
    constexpr int64_t kBytes = kVectors * kWidth * sizeof(*p);
    const char* ahead = reinterpret_cast<const char*>(p) + kAheadBytes;
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(ahead + i);
  };
  (fetch(at), ...);
}

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
    for (; j + 4 * kWidth <= count; j += 4 * kWidth) {
      fetch_ahead<4>(x + j);
      add(load(x + j), 0);
      add(load(x + j + kWidth), 2);
      add(load(x + j + 2 * kWidth), 0);
      add(load(x + j + 3 * kWidth), 2);
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

// Whether what is stored rounds by so much that float32's last bits do not count: by 2⁻¹² at least.
template <typename T>
inline constexpr bool kRoughly = sizeof(T) == 2;

// β as two floats, since 1 / (1 - β₂) turns the rounding of a float 0.999 into 1e-5 of v. The lower
// one is above zero too, so that an infinite v stays infinite.
struct Split {
  explicit Split(double x) : high(static_cast<float>(x)) {
    if (high >= x) high = std::nextafter(high, 0.0f);
    low = static_cast<float>(x - high);
  }
  float high, low;

  template <typename T>
  FT_INLINE Vec times(Vec x, Vec plus) const {
    return fma(broadcast(high), x, kRoughly<T> ? plus : fma(broadcast(low), x, plus));
  }
};

// m / (√v c + ε). Square root and division would take as long as all else together. Where there are
// estimates, one Newton step on each of them errs by 2⁻²⁸, less than a rounding. What comes out
// infinite or NaN is taken again in the long way, for there the steps do not hold.
template <typename T>
FT_INLINE Vec ratio(Vec m, Vec v, float c, float eps) {
#if defined(__AVX512F__)
  const Vec y = estimate_reciprocal_sqrt(v), s = v * y;
  const Vec root = kRoughly<T> ? s : fma(v - s * s, 0.5f * y, s);
  const Vec d = fma(root, broadcast(c), broadcast(eps));
  const Vec r = estimate_reciprocal(d), q = m * r;
  const Vec quotient = kRoughly<T> ? q : fma(m - q * d, r, q);
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

  // Elements [begin, end) of a tensor.
  void run(const AdamWRun& t, int64_t begin, int64_t end) const {
    const float step_size = t.step_size, correction = t.correction;
    T *param = static_cast<T*>(t.param), *exp_avg = static_cast<T*>(t.exp_avg);
    T* exp_avg_sq = static_cast<T*>(t.exp_avg_sq);
    T* max_exp_avg_sq = static_cast<T*>(t.max_exp_avg_sq);
    const T* grad = static_cast<const T*>(t.grad);
    // Of `kVectors` vectors from element j on, n elements each.
    const auto update = [&]<int kVectors>(int64_t j, int64_t n) __attribute__((always_inline)) {
      Vec p[kVectors], m[kVectors], v[kVectors], largest[kVectors];
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = j + i * kWidth;
        const Vec g = load(grad + at, n) * grad_scale_;
        m[i] = beta1_.template times<T>(load(exp_avg + at, n), rest1_ * g);
        v[i] = beta2_.template times<T>(load(exp_avg_sq + at, n), rest2_ * g * g);
        p[i] = load(param + at, n);
        if constexpr (kAmsgrad) {
          const Vec before = load(max_exp_avg_sq + at, n);
          largest[i] = select(before != before, before, max(before, v[i]));
        }
        const Vec step = step_size * ratio<T>(m[i], kAmsgrad ? largest[i] : v[i], correction, eps_);
        // what is infinite stays so: decayed first, it would be taken from itself
        const Vec less = fma(broadcast(decay_), p[i], step);
        p[i] -= select(abs(p[i]) == std::numeric_limits<float>::infinity(), step, less);
      }
      store_all<kVectors>(param + j, p, n);
      store_all<kVectors>(exp_avg + j, m, n);
      store_all<kVectors>(exp_avg_sq + j, v, n);
      if constexpr (kAmsgrad) store_all<kVectors>(max_exp_avg_sq + j, largest, n);
    };
    int64_t j = begin;
    for (; j + 2 * kWidth <= end; j += 2 * kWidth) {
      fetch_ahead<2>(grad + j, exp_avg + j, exp_avg_sq + j, param + j);
      if constexpr (kAmsgrad) fetch_ahead<2>(max_exp_avg_sq + j);
      update.template operator()<2>(j, kWidth);
    }
    for (; j < end; j += kWidth) {
      update.template operator()<1>(j, std::min<int64_t>(kWidth, end - j));
    }
  }

 private:
  template <int kVectors>
  static FT_INLINE void store_all(T* to, const Vec* from, int64_t n) {
    if constexpr (kVectors == 2) {
      store_pair(to, from[0], from[1]);
    } else {
      store(to, from[0], n);
    }
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
