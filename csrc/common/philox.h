// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): the definition of every dropout mask, the same bits on every backend.
//
// One call yields four 32-bit words, used as eight 16-bit draws for eight neighbouring columns:
//   counter = (column / 8, row, head, batch), key = the two halves of the seed,
//   draw of column c = 16-bit half number c % 8, low half of word 0 first,
//   kept iff draw >= threshold, threshold = round(65536 p), ties to even.
// Sixteen bits an element quantise p to 1.5e-5, so what is kept is scaled by the quantised rate.
#pragma once
#include <cmath>
#include <cstdint>

namespace ft {

inline constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
inline constexpr uint32_t kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
inline constexpr int kPhiloxRounds = 10;
inline constexpr int kDrawsPerCall = 8;

// What dropout needs to know, made once a call.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // 0: nothing is dropped; 65536: everything
  float scale = 1.0f;      // 1 / (quantised rate of what is kept), 0 when nothing is

  static Dropout with(double p, uint64_t seed) {
    auto threshold = static_cast<uint32_t>(std::nearbyint(65536.0 * p));
    float scale = threshold >= 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - threshold);
    return {seed, threshold, scale};
  }
  bool active() const { return threshold != 0; }
};

}  // namespace ft
