// Few rows times a matrix that is read in place, in AMX's matrix unit: queries times the keys and
// values of a cache (decode.cpp), a sentence times a weight (matmul.cpp).
#pragma once
#include "gemm.h"

namespace ft::FT_ISA {

// Holds the matrix unit, where it is wanted, for one thread as long as it lives; the strips of
// gemm_amx.cpp must not be called then.
class FewRowsUnit {
 public:
#if defined(__AMX_BF16__)
  explicit FewRowsUnit(bool wanted);
  ~FewRowsUnit();
  FewRowsUnit(const FewRowsUnit&) = delete;
  FewRowsUnit& operator=(const FewRowsUnit&) = delete;

 private:
  const bool held_;
#else
  explicit FewRowsUnit(bool) {}
#endif
};

// Rows from which on the unit is worth its detour through L1 (measured on Sapphire Rapids): alone
// or in twos, rows wait for memory in either case, and plain loads wait less.
inline constexpr int64_t kUnitFewest = 3;
inline constexpr int64_t kUnitRows = 16;  // rows of a tile register, and lanes in each
inline constexpr int64_t kUnitPair = 32;  // bf16 in each, and rows that are weighed at a time
// Elements of a column that are on their way through L1 at a time: 16 columns of them, twice, are a
// share of it.
inline constexpr int64_t kUnitDepth = 512;

constexpr int64_t in_whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
// Lanes of the few rows as operands, and bf16 of the columns on their way there.
constexpr int64_t unit_rows(int64_t rows, int64_t k) {
  return in_whole(rows, kUnitRows) * in_whole(k, kUnitPair) / 2;
}
constexpr int64_t unit_copies(int64_t k) {
  return 2 * kUnitRows * in_whole(k < kUnitDepth ? k : kUnitDepth, kUnitPair);
}

// Rows of lanes, `depth` in each and `ld` apart, as operands.
void pack_rows_amx(const uint32_t* rows, int64_t ld, int64_t count, int64_t depth,
                   uint32_t* packed);

// products[r * ld + j] = row r · column j over k elements, for `count` columns and those that make
// it a multiple of kUnitRows.
void dot_rows_amx(const uint32_t* packed, int64_t rows, int64_t k, const bf16* const* columns,
                  int64_t count, bf16* copies, float* products, int64_t ld);

// out[r][d] = sum over `count` values, a multiple of kUnitPair, of weight (r, j) times
// values[j][d]. Weights are read, and may be anything, up to a multiple of kUnitRows rows; `out` is
// written in pairs of vectors.
void weigh_rows_amx(const uint32_t* weights, int64_t w_ld, int64_t rows, int64_t count,
                    const bf16* const* values, int64_t dim, float* out, int64_t out_ld);

}  // namespace ft::FT_ISA
