// The two products of decode in AMX's matrix unit, on rows of a cache that are read in place.
#pragma once
#include "gemm.h"

namespace ft::FT_ISA {

// Holds the matrix unit, where it is wanted, for one thread as long as it lives; the strips of
// gemm_amx.cpp must not be called then.
class DecodeUnit {
 public:
#if defined(__AMX_BF16__)
  explicit DecodeUnit(bool wanted);
  ~DecodeUnit();
  DecodeUnit(const DecodeUnit&) = delete;
  DecodeUnit& operator=(const DecodeUnit&) = delete;

 private:
  const bool held_;
#else
  explicit DecodeUnit(bool) {}
#endif
};

// Rows of queries from which on the unit is worth its detour through L1 (measured on Sapphire
// Rapids): alone or in twos, rows wait for memory in either case, and plain loads wait less.
inline constexpr int64_t kUnitFewest = 3;
inline constexpr int64_t kUnitRows = 16;  // rows of a tile register, and lanes in each
inline constexpr int64_t kUnitPair = 32;  // bf16 in each, and keys that are weighed at a time

constexpr int64_t in_whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
// Lanes of the queries as operands, and bf16 of the keys on their way there.
constexpr int64_t unit_queries(int64_t rows, int64_t dim) {
  return in_whole(rows, kUnitRows) * in_whole(dim, kUnitPair) / 2;
}
constexpr int64_t unit_keys(int64_t dim) { return 2 * kUnitRows * in_whole(dim, kUnitPair); }

// Rows of lanes, `depth` in each, as operands.
void pack_queries_amx(const uint32_t* rows, int64_t count, int64_t depth, uint32_t* queries);

// products[r * ld + j] = query row r · key j, for `count` keys and those that make it a multiple of
// kUnitRows.
void multiply_keys_amx(const uint32_t* queries, int64_t rows, int64_t dim, const bf16* const* keys,
                       int64_t count, bf16* copies, float* products, int64_t ld);

// out[r][d] = sum over `count` keys, a multiple of kUnitPair, of probability (r, key) times
// values[key][d]. Probabilities are read, and may be anything, up to a multiple of kUnitRows rows;
// `out` is written in pairs of vectors.
void weigh_values_amx(const uint32_t* probabilities, int64_t p_ld, int64_t rows, int64_t count,
                      const bf16* const* values, int64_t dim, float* out, int64_t out_ld);

}  // namespace ft::FT_ISA
