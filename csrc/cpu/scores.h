// From products to scores: softcap, bias, bias by distance, ALiBi, segments; and back.
//
// Every term is a pass over one row of scores in L1, and only the terms that a call has are passed.
// What the relative positions add comes from a product of its own: positions.h.
#pragma once
#include "mask.h"
#include "pack.h"
#include "tanh.h"

namespace ft::FT_ISA {

// kWidth elements of a bias row; -inf where a boolean forbids.
template <typename T>
FT_INLINE Vec load_bias(const T* p, int64_t left) {
  return load(p, left);
}
FT_INLINE Vec load_bias(const bool* p, int64_t left) {
#if defined(__AVX512F__)
  const auto there = static_cast<__mmask16>(left >= kWidth ? 0xffff : (1u << left) - 1);
  const __m128i bytes = _mm_maskz_loadu_epi8(there, p);
  return (Vec)_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), _mm512_set1_ps(-INFINITY),
                                   _mm512_setzero_ps());
#else
  uint8_t bytes[kWidth] = {};
  std::memcpy(bytes, p, left < kWidth ? left : kWidth);
  UVec allowed;
  for (int i = 0; i < kWidth; ++i) allowed[i] = bytes[i];
  return select(as<IVec>(allowed != 0u), zero(), broadcast(-INFINITY));
#endif
}

// The row of a head whose scores are made.
struct ScoreRow {
  const Sequence& s;
  int64_t head, i;
  int64_t key, n;  // keys [key, key + n)
};

class Scores {
 public:
  explicit Scores(const AttentionParams& p)
      : p_(p),
        scale_(static_cast<float>(p.scale)),
        untouched_(!p.bias && !p.distance_bias && !p.alibi_slopes && p.softcap == 0.0 &&
                   p.scale >= kLeastScale) {}

  // Whether scores are scaled products and nothing else.
  bool plain() const { return untouched_ && !p_.segment_scores && !p_.position_query; }
  // What softmax multiplies by what `apply` leaves, to take powers of 2. Products stay as they are
  // where only a positive scale is to come: the largest product is then the largest score.
  double factor() const { return untouched_ ? p_.scale * kLog2e : kLog2e; }

  // Turns products into scores, but for `factor`. Where `slopes` is given it gets the derivative of
  // softcap, if there is one.
  FT_INLINE void apply(const ScoreRow& r, float* scores, float* slopes = nullptr) const {
    if (p_.segment_scores) add_segments(r, scores);
    if (!untouched_) apply_terms(r, scores, slopes);
  }
  // Whether `apply` gives slopes.
  bool capped() const { return p_.softcap != 0.0; }

  int64_t column(const ScoreRow& r) const { return r.s.column + r.key; }
  // Index of the relative position of the row and its first key.
  int64_t position(const ScoreRow& r) const { return p_.position_zero + column(r) - r.i; }
  // Of segment_scores and its gradient.
  int64_t segment_index(const ScoreRow& r) const {
    return 2 * ((r.s.batch * p_.heads + r.head) * p_.q_len + r.i);
  }
  // kWidth lanes from key j of the row on: whether its segment is another than the row's.
  FT_INLINE IVec differs(const ScoreRow& r, int64_t j) const {
    const int32_t own = p_.query_segments[r.s.batch * p_.q_len + r.i];
    const int32_t* of_key = p_.key_segments + r.s.batch * p_.kv_len + column(r);
    return as<IVec>(load(reinterpret_cast<const float*>(of_key) + j, r.n - j)) != own;
  }

 private:
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLeastScale = 1e-30;  // so that -inf times it is no NaN

  void add_segments(const ScoreRow& r, float* scores) const {
    const float* of_row = p_.segment_scores + segment_index(r);
    const Vec same = broadcast(of_row[0]), other = broadcast(of_row[1]);
    for (int64_t j = 0; j < r.n; j += kWidth) {
      store(scores + j, load(scores + j) + select(differs(r, j), other, same));
    }
  }
  // Out of line: a call with one of these terms is no call of the plain kernel. The scale goes with
  // the first of them.
  __attribute__((noinline)) void apply_terms(const ScoreRow& r, float* scores,
                                             float* slopes) const {
    float scale = scale_;
    const auto add = [&](auto* term) __attribute__((always_inline)) {
      for (int64_t j = 0; j < r.n; j += kWidth) {
        store(scores + j, fma(load(scores + j), broadcast(scale), load_bias(term + j, r.n - j)));
      }
      scale = 1.0f;
    };
    if (capped()) {
      cap(scores, r.n, slopes);
      scale = 1.0f;
    }
    if (p_.bias && p_.bias_dtype == DType::kBool) {
      add(row<bool>(p_.bias, r.s.index, r.head, r.i) + column(r));
    } else if (p_.bias) {
      with_storage(p_.bias_dtype, [&](auto storage) {
        add(row<decltype(storage)>(p_.bias, r.s.index, r.head, r.i) + column(r));
      });
    }
    if (p_.distance_bias) add(p_.distance_bias + r.head * p_.positions + position(r));
    if (p_.alibi_slopes) {
      add_alibi(r, scores, scale);
      scale = 1.0f;
    }
    if (scale != 1.0f) {
      for (int64_t j = 0; j < r.n; j += kWidth) store(scores + j, load(scores + j) * scale);
    }
  }
  void cap(float* scores, int64_t n, float* slopes) const {
    const auto most = static_cast<float>(p_.softcap);
    const auto inner = static_cast<float>(p_.scale / p_.softcap);
    for (int64_t j = 0; j < n; j += kWidth) {
      const Vec t = tanh(load(scores + j) * inner);
      store(scores + j, t * most);
      if (slopes) store(slopes + j, 1.0f - t * t);
    }
  }
  void add_alibi(const ScoreRow& r, float* scores, float scale) const {
    const Vec slope = broadcast(-p_.alibi_slopes[r.s.index * p_.alibi_stride + r.head]);
    constexpr int64_t kFar = int64_t{1} << 30;
    const int64_t distance = std::clamp(r.key - r.i - r.s.diagonal, -kFar, kFar);
    for (int64_t j = 0; j < r.n; j += kWidth) {
      const IVec lanes = lane_numbers() + static_cast<int32_t>(distance + j);
      const Vec away = abs(__builtin_convertvector(lanes, Vec));
      store(scores + j, fma(load(scores + j), broadcast(scale), slope * away));
    }
  }

  const AttentionParams& p_;
  const float scale_;
  const bool untouched_;
};

// Keys before the first one that a row sees.
FT_INLINE void forbid(float* scores, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth) {
    store(scores + j, select(lanes_below(n - j), broadcast(-INFINITY), load(scores + j)));
  }
}

}  // namespace ft::FT_ISA
