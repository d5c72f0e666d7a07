// Which cached keys a row sees, and what becomes of its products with them before the softmax.
#pragma once
#include <algorithm>

#include "../common/decode.h"
#include "tanh.h"

namespace ft::FT_ISA {

// Keys [begin, end).
struct KeySpan {
  int64_t begin, end;

  int64_t size() const { return end > begin ? end - begin : 0; }
  KeySpan within(KeySpan other) const {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
};

// The keys that row i of a sequence with so many keys sees. Neither end falls as i grows.
inline KeySpan seen_by_row(const DecodeParams& p, int64_t keys, int64_t i) {
  const int64_t position = i + keys - p.q_len;
  KeySpan range{0, p.causal ? position + 1 : keys};
  if (p.window_left >= 0) range.begin = position - p.window_left;
  if (p.window_right >= 0) range.end = std::min(range.end, position + p.window_right + 1);
  return range.within({0, keys});
}
// The keys that any row sees, and some that none does where there are rows before the first key.
inline KeySpan seen_by_any(const DecodeParams& p, int64_t keys) {
  if (p.q_len == 0) return {0, 0};
  return {seen_by_row(p, keys, 0).begin, seen_by_row(p, keys, p.q_len - 1).end};
}

// Turns products into scores. Where nothing but a positive scale is asked for, the products stay,
// and the scale is left for the softmax.
class DecodeScores {
 public:
  explicit DecodeScores(const DecodeParams& p)
      : p_(p), plain_(p.scale >= 0.0 && p.softcap == 0.0 && !p.alibi_slopes) {}

  // What the softmax multiplies the scores by: it takes powers of 2.
  double factor() const {
    constexpr double kLog2E = 1.44269504088896340736;
    return plain_ ? p_.scale * kLog2E : kLog2E;
  }

  // products[j - begin] for the keys `range` of row i of a sequence with so many keys.
  void apply(int64_t b, int64_t head, int64_t i, int64_t keys, KeySpan range,
             float* products) const {
    if (plain_) return;
    const bool capped = p_.softcap != 0.0;
    const auto scale = static_cast<float>(capped ? p_.scale / p_.softcap : p_.scale);
    const auto cap = static_cast<float>(p_.softcap);
    const float slope = p_.alibi_slopes ? p_.alibi_slopes[b * p_.alibi_stride + head] : 0.0f;
    const int64_t position = i + keys - p_.q_len;
    for (int64_t j = 0; j < range.size(); j += kWidth) {
      Vec x = load(products + j) * scale;
      if (capped) x = cap * tanh(x);
      if (slope != 0.0f) {
        const auto first = static_cast<float>(position - range.begin - j);
        const Vec lane = __builtin_convertvector(lane_numbers(), Vec);
        x = fma(broadcast(-slope), abs(first - lane), x);
      }
      store(products + j, x);
    }
  }

 private:
  const DecodeParams& p_;
  const bool plain_;
};

}  // namespace ft::FT_ISA
