// The gradients of what is added to scores (scores.h): bias, bias by distance, segments; and
// softcap's derivative, which comes between dS and the gradients of query and key.
#pragma once
#include "scores.h"

namespace ft::FT_ISA {

class ScoreGradients {
 public:
  ScoreGradients(const AttentionGradParams& g, const Scores& scores) : g_(g), scores_(scores) {}

  // Whether a row of dS is looked at beside its products.
  bool any() const {
    return g_.dbias || g_.dbias_of_rows || g_.ddistance_bias || g_.dsegment_scores ||
           scores_.capped();
  }
  // Adds a row of dS to the sums that are wanted, and writes its gradient of the products `to`.
  // slopes: softcap's derivative, from `Scores::apply`.
  template <typename Element>
  __attribute__((noinline)) void add(const ScoreRow& r, const float* ds, const float* slopes,
                                     Element* to) const {
    if (g_.dbias) {
      add(ds, r.n, mutable_row<float>(g_.dbias, r.s.index, r.head, r.i) + scores_.column(r));
    }
    if (g_.dbias_of_rows) {
      add(ds, r.n, mutable_row<double>(g_.dbias_of_rows, r.s.index, r.head, 0) + scores_.column(r));
    }
    if (g_.ddistance_bias) {
      add(ds, r.n, g_.ddistance_bias + r.head * g_.forward.positions + scores_.position(r));
    }
    Vec same = zero(), other = zero();
    for (int64_t j = 0; j < r.n; j += kWidth) {
      Vec x = load(ds + j, r.n - j);
      if (scores_.capped()) x = x * load(slopes + j);
      if (g_.dsegment_scores) {
        const IVec differs = scores_.differs(r, j);
        other += select(differs, x, zero());
        same += select(differs, zero(), x);
      }
      store(to + j, x);
    }
    if (g_.dsegment_scores) {
      float* sums = g_.dsegment_scores + scores_.segment_index(r);
      sums[0] += sum(same) * static_cast<float>(g_.forward.scale);
      sums[1] += sum(other) * static_cast<float>(g_.forward.scale);
    }
  }

 private:
  static void add(const float* ds, int64_t n, double* sum) {
    for (int64_t j = 0; j < n; ++j) sum[j] += ds[j];
  }
  static void add(const float* ds, int64_t n, float* sum) {
    for (int64_t j = 0; j < n; j += kWidth) {
      store(sum + j, load(sum + j, n - j) + load(ds + j, n - j), n - j);
    }
  }

  const AttentionGradParams& g_;
  const Scores& scores_;
};

}  // namespace ft::FT_ISA
