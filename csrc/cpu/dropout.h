// Philox4x32-10 (common/philox.h) for kWidth / 2 counters at once, and the masks made of it.
#pragma once
#include "../common/philox.h"
#include "simd.h"

namespace ft::FT_ISA {

// 32-bit words live in 64-bit lanes, where one instruction gives the full product of two of them.
FT_INLINE U64Vec multiply_low_halves(U64Vec a, U64Vec b) {
#if defined(__AVX512F__)
  return (U64Vec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U64Vec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (U64Vec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline constexpr int kCounters = kWidth / 2;              // Philox calls in one vector
inline constexpr int kDraws = kCounters * kDrawsPerCall;  // 16-bit draws they give

// The 64-bit lanes of a and b in turn: a0 b0 a1 b1 … in two vectors.
FT_INLINE void store_interleaved(uint16_t* to, U64Vec a, U64Vec b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i high = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  store_bits(to, _mm512_permutex2var_epi64((__m512i)a, low, (__m512i)b));
  store_bits(to + 32, _mm512_permutex2var_epi64((__m512i)a, high, (__m512i)b));
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);  // a0 b0 a2 b2
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  store_bits(to, _mm256_permute2x128_si256(even, odd, 0x20));
  store_bits(to + 16, _mm256_permute2x128_si256(even, odd, 0x31));
#else
  uint64_t words[2 * kCounters];
  for (int i = 0; i < kCounters; ++i) {
    words[2 * i] = a[i];
    words[2 * i + 1] = b[i];
  }
  std::memcpy(to, words, sizeof(words));
#endif
}

// What the columns of one row share: the key of every round, and the first two rounds of the words
// that do not depend on the column.
struct PhiloxRow {
  PhiloxRow(uint64_t seed, int64_t row, int64_t head, int64_t batch) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key[round][0] = k0, key[round][1] = k1;
      k0 += kPhiloxWeyl[0], k1 += kPhiloxWeyl[1];
    }
    const uint64_t first = uint64_t{kPhiloxMultiplier[1]} * static_cast<uint32_t>(head);
    const uint64_t second =
        uint64_t{kPhiloxMultiplier[0]} *
        static_cast<uint32_t>((first >> 32) ^ static_cast<uint32_t>(row) ^ key[0][0]);
    c2_first = static_cast<uint32_t>(batch) ^ key[0][1];
    c0_second = static_cast<uint32_t>(first) ^ key[1][0];
    c2_second = (second >> 32) ^ key[1][1];
    c3_second = static_cast<uint32_t>(second);
  }
  uint64_t key[kPhiloxRounds][2];
  uint64_t c2_first, c0_second, c2_second, c3_second;  // c<word>_<round>: met by a product there
};

// draws[i] is the draw of column `column + i` for i < kChains * kDraws; `column` is a multiple of
// kDrawsPerCall. A chain of ten rounds mostly waits for its own products: several go side by side.
template <int kChains>
FT_INLINE void philox(const PhiloxRow& row, int64_t column, uint16_t* draws) {
  constexpr uint64_t kLow = 0xffffffffu;
  const U64Vec multiplier0 = U64Vec{} + kPhiloxMultiplier[0];
  const U64Vec multiplier1 = U64Vec{} + kPhiloxMultiplier[1];
  U64Vec lanes;
  for (int i = 0; i < kCounters; ++i) lanes[i] = i;
  // A word is the low half of its lane. The high half holds anything: products ignore it.
  U64Vec c0[kChains], c1[kChains], c2[kChains], c3[kChains];
  for (int k = 0; k < kChains; ++k) {
    const U64Vec counters = lanes + static_cast<uint32_t>(column / kDrawsPerCall + k * kCounters);
    const U64Vec product0 = multiply_low_halves(counters, multiplier0);
    c1[k] = multiply_low_halves((product0 >> 32) ^ row.c2_first, multiplier1);
    c0[k] = (c1[k] >> 32) ^ row.c0_second;
    c2[k] = product0 ^ row.c2_second;
    c3[k] = U64Vec{} + row.c3_second;
  }
#pragma GCC unroll 2
  for (int round = 2; round < kPhiloxRounds; ++round) {
    for (int k = 0; k < kChains; ++k) {
      const U64Vec product0 = multiply_low_halves(c0[k], multiplier0);
      const U64Vec product1 = multiply_low_halves(c2[k], multiplier1);
      c0[k] = (product1 >> 32) ^ c1[k] ^ row.key[round][0];
      c2[k] = (product0 >> 32) ^ c3[k] ^ row.key[round][1];
      c1[k] = product1;
      c3[k] = product0;
    }
  }
  for (int k = 0; k < kChains; ++k) {
    const U64Vec first = (c0[k] & kLow) | (c1[k] << 32);   // draws 0…3 of each counter
    const U64Vec second = (c2[k] & kLow) | (c3[k] << 32);  // draws 4…7
    store_interleaved(draws + k * kDraws, first, second);
  }
}

// All draws of columns [begin, end) of one row, from a buffer of at least draw_space(end - begin).
// Returns the address of the draw of `begin`. Drawing leaves the memory idle: `meanwhile(begin,
// end)` is called with one part of the columns after the other, to fetch what they will be used on.
constexpr int64_t draw_space(int64_t columns) {
  return (columns + kDrawsPerCall + 2 * kDraws) / kDraws * kDraws;
}
template <typename Meanwhile>
FT_INLINE const uint16_t* draw_row(uint64_t seed, int64_t begin, int64_t end, int64_t row,
                                   int64_t head, int64_t batch, uint16_t* buffer,
                                   const Meanwhile& meanwhile) {
  const int64_t start = begin / kDrawsPerCall * kDrawsPerCall;
  constexpr int kChains = kWidth == 16 ? 4 : 3;  // as many as the registers hold
  const PhiloxRow shared(seed, row, head, batch);
  int64_t c = start;
  for (; c + (kChains - 1) * kDraws < end; c += kChains * kDraws) {
    meanwhile(c, c + kChains * kDraws);
    philox<kChains>(shared, c, buffer + (c - start));
  }
  for (; c < end; c += kDraws) philox<1>(shared, c, buffer + (c - start));
  return buffer + (begin - start);
}
FT_INLINE const uint16_t* draw_row(uint64_t seed, int64_t begin, int64_t end, int64_t row,
                                   int64_t head, int64_t batch, uint16_t* buffer) {
  return draw_row(seed, begin, end, row, head, batch, buffer, [](int64_t, int64_t) {});
}

// kWidth elements of x whose draws start at `draws`: kept and multiplied by `scale`, or zero. The
// buffer of draws must be readable for a whole vector.
FT_INLINE Vec drop(Vec x, const uint16_t* draws, uint32_t threshold, float scale) {
  const UVec d = widen(load_bits<HVec>(draws));
  return select(as<IVec>(d >= threshold), x * scale, zero());
}

}  // namespace ft::FT_ISA
