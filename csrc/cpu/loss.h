// What both losses know of a row: its sums, its loss, and the gradient of its logits.
//
// Logits are met as x - m, with m the largest of them, in forward and backward alike: so a constant
// added to a whole row costs no digit, and nothing overflows.
#pragma once
#include <algorithm>
#include <cmath>

#include "../common/loss.h"
#include "parallel.h"
#include "scratch.h"
#include "softmax.h"

namespace ft::FT_ISA {

// e^d of d <= 0 for sums of them and for gradients: relative error 2^-22, 0 below 2^-126, exactly 1
// of 0. `softmax.h` has twice the digits for probabilities; here they would cost a third more time.
// kDegree 4: 3e-6, for what is rounded to 16 bits at once.
template <int kDegree>
struct Exponential {
  struct Parts {
    Vec fraction, power;  // e^d is their product
  };
  static FT_INLINE Parts parts(Vec d) {
    const Vec log2_e = broadcast(kLog2E);
    d = max(broadcast(-127.0f / kLog2E), d);
    const Vec shifted = fma(d, log2_e, broadcast(kExp2Magic));
    return {fraction(fma(d, log2_e, kExp2Magic - shifted)), as<Vec>(as<UVec>(shifted) << 23)};
  }
  static FT_INLINE Vec of(Vec d) {
    const Parts p = parts(d);
    return p.fraction * p.power;
  }

 private:
  // Minimax of 2^f as in simd.h; of degree 5 within 1.1e-7.
  static FT_INLINE Vec fraction(Vec f) {
    if constexpr (kDegree == 5) {
      Vec p = fma(broadcast(1.326472725e-03f), f, broadcast(9.671512688e-03f));
      p = fma(p, f, broadcast(5.550733744e-02f));
      p = fma(p, f, broadcast(2.402224208e-01f));
      p = fma(p, f, broadcast(6.931469776e-01f));
      return fma(p, f, broadcast(1.0f));
    } else {
      return exp2_fraction<kDegree>(f);
    }
  }
};
using SumOfExponentials = Exponential<5>;
template <typename T>
using ExponentialRoundedTo = Exponential<sizeof(T) == 2 ? 4 : 5>;

// A row's logits so far: the largest, m, and the sums of e^(x - m) and of x - m. The second is
// for label smoothing alone.
struct RowSums {
  float maximum = -INFINITY;
  double total = 0.0, below = 0.0;
  int64_t count = 0;

  float shift() const { return maximum == -INFINITY ? 0.0f : maximum; }
  // Makes room for logits up to `top`.
  void raise(float top) {
    if (!(top > maximum)) return;
    if (count > 0) {
      below += static_cast<double>(count) * (double{shift()} - top);
      total *= std::exp(double{maximum} - top);
    }
    maximum = top;
  }
  // Logits that come after these.
  void add(const RowSums& next) {
    raise(next.maximum);
    if (next.count == 0) return;
    below += next.below + static_cast<double>(next.count) * (double{next.shift()} - shift());
    total += next.total * std::exp(double{next.shift()} - shift());
    count += next.count;
  }
  RowStatistics statistics() const { return {shift(), static_cast<float>(total)}; }
};

// `picked`: the target's logit.
inline double loss_of_row(const LossOptions& o, const RowSums& row, float picked) {
  const double log_total = std::log(row.total), smoothing = o.label_smoothing;
  double loss = log_total - (1.0 - smoothing) * (double{picked} - row.shift());
  if (smoothing > 0.0) loss -= smoothing * row.below / static_cast<double>(row.count);
  if (o.z_loss != 0.0f) {
    const double lse = row.shift() + log_total;
    loss += double{o.z_loss} * lse * lse;
  }
  return loss;
}

// Rows that count.
inline int64_t counted_rows(const int64_t* target, int64_t rows, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) count += target[r] != ignore_index;
  return count;
}

// The losses of rows, where they are wanted or where their sum is.
class Losses {
 public:
  Losses(const LossOptions& options, const int64_t* target, int64_t rows, float* loss)
      : options_(options),
        target_(target),
        rows_(rows),
        loss_(loss),
        scratch_(Scratch::bytes<double>(reduced() ? rows : 0)),
        each_(scratch_.take<double>(reduced() ? rows : 0)) {}

  void ignore(int64_t r) const { put(r, 0.0); }
  void set(int64_t r, const RowSums& row, float picked) const {
    put(r, loss_of_row(options_, row, picked));
  }
  // In order, so that the threads that set them do not matter. Without a row that counts, a mean is
  // 0 / 0, as in PyTorch.
  void reduce() const {
    if (!reduced()) return;
    double sum = 0.0;
    for (int64_t r = 0; r < rows_; ++r) sum += each_[r];
    if (options_.reduction == Reduction::kMean) {
      sum /= static_cast<double>(counted_rows(target_, rows_, options_.ignore_index));
    }
    *loss_ = static_cast<float>(sum);
  }

 private:
  bool reduced() const { return options_.reduction != Reduction::kNone; }
  void put(int64_t r, double loss) const {
    if (reduced()) {
      each_[r] = loss;
    } else {
      loss_[r] = static_cast<float>(loss);
    }
  }

  const LossOptions& options_;
  const int64_t* const target_;
  const int64_t rows_;
  float* const loss_;
  Scratch scratch_;
  double* const each_;
};

// Of the logits x of a row: d loss / dx = e^(x - maximum) scale - uniform, and less at the target.
class RowGradient {
 public:
  RowGradient(const LossOptions& o, const RowStatistics& row, float grad, int64_t classes)
      : maximum_(row.maximum) {
    const double smoothing = o.label_smoothing, total = row.total;
    const double uniform = grad * smoothing / static_cast<double>(classes);
    const double lse = o.z_loss == 0.0f ? 0.0 : row.maximum + std::log(total);
    const double of_z_loss = 2.0 * o.z_loss * lse;
    scale_ = static_cast<float>(grad / total * (1.0 + of_z_loss));
    uniform_ = static_cast<float>(uniform);
    softmax_ = grad / total;
    of_z_loss_ = of_z_loss;
    target_ = uniform + grad * (1.0 - smoothing);
  }
  // As it will be rounded to T.
  template <typename T>
  FT_INLINE Vec of(Vec x) const {
    return fma(ExponentialRoundedTo<T>::of(x - broadcast(maximum_)), broadcast(scale_),
               broadcast(-uniform_));
  }
  // Where the softmax is near 1, this is the little that is left.
  float at_target(float x) const {
    const double softmax = std::exp(double{x} - maximum_) * softmax_;
    return static_cast<float>(softmax - target_ + softmax * of_z_loss_);
  }

 private:
  float maximum_, scale_, uniform_;
  double softmax_, of_z_loss_, target_;
};

template <typename T>
FT_INLINE float element(const T* x) {
  return load(x, 1)[0];
}

// The gradient of each row's loss.
class LossGradients {
 public:
  LossGradients(const LossOptions& o, const int64_t* target, int64_t rows, const float* grad)
      : each_(o.reduction == Reduction::kNone ? grad : nullptr),
        common_(o.reduction == Reduction::kNone ? 0.0f : *grad) {
    if (o.reduction == Reduction::kMean) {
      const int64_t count = counted_rows(target, rows, o.ignore_index);
      common_ = static_cast<float>(double{common_} / static_cast<double>(count));
    }
  }
  float of(int64_t r) const { return each_ ? each_[r] : common_; }

 private:
  const float* each_;
  float common_;
};

}  // namespace ft::FT_ISA
