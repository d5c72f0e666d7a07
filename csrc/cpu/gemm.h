// The one register-blocked matrix product that attention, its backward, MLP and linear are made of.
//
//   C[m][n] (+)= sum over k of A[m][k] * B[k][n]        C in float
//
// k counts *lanes*, the 32 bits that one multiply-add takes from A: one float, or a pair of bf16
// where the machine has the dot product of pairs. D::kTileRows x kTileCols accumulators stay in
// registers while k runs: for each k one broadcast a row of A and one load a vector of B feed
// D::kTileRows * kTileVecs multiply-adds, so loads stay below one a multiply-add.
// Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.
#pragma once
#include <algorithm>

#include "simd.h"

namespace ft::FT_ISA {

// How one lane is multiplied and added, and how many rows of A a tile takes. 32 vector registers
// hold 6 x 4 accumulators, a row of B and a broadcast; 16 hold 6 x 2.
struct FloatDot {
  using Lane = float;
  static constexpr int kPerLane = 1;
  static constexpr int kTileRows = 6;
  static constexpr bool kInMatrixUnit = false;
  static FT_INLINE Vec broadcast_lane(Lane a) { return broadcast(a); }
  static FT_INLINE Vec load_lanes(const Lane* b) { return load(b); }
  static FT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
  using Lane = uint32_t;  // elements 2k (low half) and 2k + 1
  static constexpr int kPerLane = 2;
#if defined(__AMX_BF16__)  // then tiles are the matrix unit's, see gemm_amx.cpp
  static constexpr int kTileRows = 32;
  static constexpr bool kInMatrixUnit = true;
#else
  static constexpr int kTileRows = 6;
  static constexpr bool kInMatrixUnit = false;
#endif
  static FT_INLINE UVec broadcast_lane(Lane a) { return a | UVec{}; }
  static FT_INLINE UVec load_lanes(const Lane* b) { return load_bits<UVec>(b); }
  static FT_INLINE Vec multiply_add(UVec a, UVec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Which product serves a storage type: bf16 pairs where there is an instruction, else floats.
template <typename T>
struct DotFor {
  using type = FloatDot;
};
#if defined(__AVX512BF16__)
template <>
struct DotFor<bf16> {
  using type = BFloat16Dot;
};
#endif
template <typename T>
using Dot = typename DotFor<T>::type;

// What a product reads of floats that a kernel has made, as probabilities: the floats themselves
// where they are lanes, else the storage type.
template <typename T>
using Operand = std::conditional_t<Dot<T>::kPerLane == 1, float, T>;

inline constexpr int kMostTileRows = std::max(FloatDot::kTileRows, Dot<bf16>::kTileRows);

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileVecs = 4;
#else
inline constexpr int kTileVecs = 2;
#endif
inline constexpr int kTileCols = kTileVecs * kWidth;

// Sums longer than this are cut (dots.h: those of one register lane; the matrix unit, for L1, at
// half of it): each block of k is summed from zero in registers and then added to
// C. That keeps the rounding error of a long sum near sqrt(k / kSumLanes) instead of k, on a level
// with the libraries we are compared with, and a panel of B (kSumLanes x kTileCols) within L2.
inline constexpr int64_t kSumLanes = 384;

// A panel is kTileCols columns of B, k-major: panel[k * kTileCols + column]. Lanes past the last
// column or row are zero. panels(n) panels hold n columns.
constexpr int64_t panels(int64_t n) { return (n + kTileCols - 1) / kTileCols; }

// One operand A as the tile reads it: lane (m, k) is at data[m * row_stride + k * k_stride].
template <typename Lane>
struct LanesA {
  const Lane* data;
  int64_t row_stride, k_stride;
};

// C tile of `rows` (1…D::kTileRows) x `vecs` (1…kTileVecs) vectors; B has `ldb` lanes between
// successive k. With `accumulate` the sum is added to C, else C is overwritten.
// A's fields come one by one: as a struct they would travel through memory, and wait there behind
// the stores of the tile before.
template <typename D>
using TileFunction = void (*)(int64_t k, const typename D::Lane* a, int64_t row_stride,
                              int64_t k_stride, const typename D::Lane* b, int64_t ldb, float* c,
                              int64_t ldc, bool accumulate);

template <typename D>
struct TileTable {
  TileFunction<D> at[D::kTileRows][kTileVecs];
};
template <typename D>
struct Tiles {
  static const TileTable<D> table;  // gemm.cpp
};

// Other work, a piece a call. The matrix unit leaves the rest of a core idle: it is called once for
// every kMatrixStep lanes of kMatrixCols columns.
struct Meanwhile {
  void* context = nullptr;
  void (*some)(void* context) = nullptr;
};
inline constexpr int64_t kMatrixStep = 16, kMatrixCols = 32;

// The same in AMX's matrix unit, a whole strip at a time; A's k_stride is 1. Whoever calls it holds
// a MatrixUnit, which gives the unit back at the end of a thread's work.
void multiply_strip_amx(int64_t rows, int64_t cols, int64_t k, const LanesA<uint32_t>& a,
                        const uint32_t* b, int64_t panel_stride, float* c, int64_t ldc,
                        bool accumulate, const Meanwhile& meanwhile);  // gemm_amx.cpp
// `steps` times four products of tile registers, for peak.cpp: kStepFlops each time.
inline constexpr double kStepFlops = 4 * 2.0 * 16 * 16 * 32;
void multiply_registers_amx(int64_t steps);
struct MatrixUnit {
#if defined(__AMX_BF16__)
  ~MatrixUnit();
#endif
};

// A strip: `rows` <= D::kTileRows rows of A against `cols` columns in panels that lie
// `panel_stride` lanes apart; C is written in whole vectors, so its rows must have room up to the
// next kWidth. `b` points at the first k of the first panel. `meanwhile` is for the matrix unit; it
// may be called any number of times, or not at all.
template <typename D>
FT_INLINE void multiply_strip(int64_t rows, int64_t cols, int64_t k, LanesA<typename D::Lane> a,
                              const typename D::Lane* b, int64_t panel_stride, float* c,
                              int64_t ldc, bool accumulate, const Meanwhile& meanwhile = {}) {
  if constexpr (D::kInMatrixUnit) {
    return multiply_strip_amx(rows, cols, k, a, b, panel_stride, c, ldc, accumulate, meanwhile);
  } else {
    const auto& tiles = Tiles<D>::table.at[rows - 1];
    for (int64_t n = 0; n < cols; n += kTileCols, b += panel_stride) {
      const int64_t left = cols - n;
      const int64_t vecs = left >= kTileCols ? kTileVecs : (left + kWidth - 1) / kWidth;
      tiles[vecs - 1](k, a.data, a.row_stride, a.k_stride, b, kTileCols, c + n, ldc, accumulate);
    }
  }
}

}  // namespace ft::FT_ISA
