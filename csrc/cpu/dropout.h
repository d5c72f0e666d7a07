// Philox4x32-10 (common/philox.h) for kWidth / 2 counters at once, and the masks made of it.
#pragma once
#include "../common/philox.h"
#include "simd.h"

namespace ft::FT_ISA {

// 32-bit words live in 64-bit lanes, where one instruction gives the full product of two of them.
FT_INLINE U64Vec multiply_low_halves(U64Vec a, U64Vec b) {
#if defined(__AVX512F__)
  return (U64Vec)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U64Vec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (U64Vec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline constexpr int kCounters = kWidth / 2;               // Philox calls in one vector
inline constexpr int kDraws = kCounters * kDrawsPerCall;  // 16-bit draws they give

// draws[i] is the draw of column `column + i`; `column` is a multiple of kDrawsPerCall.
FT_INLINE void philox(uint64_t seed, int64_t column, int64_t row, int64_t head, int64_t batch,
                      uint16_t* draws) {
  U64Vec c0, c1 = U64Vec{} + static_cast<uint32_t>(row),
             c2 = U64Vec{} + static_cast<uint32_t>(head),
             c3 = U64Vec{} + static_cast<uint32_t>(batch);
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = static_cast<uint32_t>(column / kDrawsPerCall) + static_cast<uint32_t>(i);
  }
  const U64Vec multiplier0 = U64Vec{} + kPhiloxMultiplier[0];
  const U64Vec multiplier1 = U64Vec{} + kPhiloxMultiplier[1];
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const U64Vec product0 = multiply_low_halves(c0, multiplier0);
    const U64Vec product1 = multiply_low_halves(c2, multiplier1);
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c1 = product1 & 0xffffffffu;
    c3 = product0 & 0xffffffffu;
    key0 += kPhiloxWeyl[0];
    key1 += kPhiloxWeyl[1];
  }
  const U64Vec first = (c0 & 0xffffffffu) | (c1 << 32);   // draws 0…3 of each counter
  const U64Vec second = (c2 & 0xffffffffu) | (c3 << 32);  // draws 4…7
  uint64_t interleaved[2 * kCounters];
  for (int i = 0; i < kCounters; ++i) {
    interleaved[2 * i] = first[i];
    interleaved[2 * i + 1] = second[i];
  }
  std::memcpy(draws, interleaved, sizeof(interleaved));
}

// All draws of columns [begin, end) of one row, from a buffer of at least draw_space(end - begin).
// Returns the address of the draw of `begin`.
constexpr int64_t draw_space(int64_t columns) {
  return (columns + kDrawsPerCall + 2 * kDraws) / kDraws * kDraws;
}
FT_INLINE const uint16_t* draw_row(uint64_t seed, int64_t begin, int64_t end, int64_t row,
                                   int64_t head, int64_t batch, uint16_t* buffer) {
  const int64_t start = begin / kDrawsPerCall * kDrawsPerCall;
  for (int64_t c = start; c < end; c += kDraws) {
    philox(seed, c, row, head, batch, buffer + (c - start));
  }
  return buffer + (begin - start);
}

// kWidth elements of x whose draws start at `draws`: kept and multiplied by `scale`, or zero. The
// buffer of draws must be readable for a whole vector.
FT_INLINE Vec drop(Vec x, const uint16_t* draws, uint32_t threshold, float scale) {
  const UVec d = widen(load_bits<HVec>(draws));
  return select(as<IVec>(d >= threshold), x * scale, zero());
}

}  // namespace ft::FT_ISA
