// A small vector type on the GCC/Clang vector extensions: the kernels are written once over it and
// compiled once per instruction set. Intrinsics appear only where the language has no word for an
// operation (max with x86's NaN rule, conversions, the bf16 dot product).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FT_INLINE inline __attribute__((always_inline))

namespace ft::FT_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HVec __attribute__((vector_size(2 * kWidth)));  // 16-bit storage of one Vec
typedef uint16_t HPair __attribute__((vector_size(4 * kWidth)));  // two of them
typedef uint64_t U64Vec __attribute__((vector_size(4 * kWidth)));
typedef double DVec __attribute__((vector_size(4 * kWidth)));  // half as many lanes

FT_INLINE Vec broadcast(float x) { return x - Vec{}; }  // x - 0 is x, so only the broadcast is left
FT_INLINE Vec zero() { return Vec{}; }

template <typename V>
FT_INLINE V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
FT_INLINE void store_bits(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <typename To, typename From>
FT_INLINE To as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return load_bits<To>(&v);
}

FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // contracted where the machine can
FT_INLINE Vec select(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }

#if defined(__AVX512F__)
// The plain AVX-512 intrinsics pass an undefined operand through, which GCC 12 warns of in every
// user of its own header. With all lanes chosen, the masked ones are the same instruction without
// it.
inline constexpr __mmask16 kAllLanes = 0xffff;
#endif

// Where one operand is NaN the second is returned, on every machine.
FT_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
FT_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
FT_INLINE Vec sqrt(Vec a) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(kAllLanes, (__m512)a);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)a);
#elif defined(__x86_64__)
  return (Vec)_mm_sqrt_ps((__m128)a);
#else
  return (Vec)vsqrtq_f32((float32x4_t)a);
#endif
}
#if defined(__AVX512F__)
// Within 2⁻¹⁴ of 1 / a and of 1 / √a; of the latter 0 where a is 0.
FT_INLINE Vec estimate_reciprocal(Vec a) {
  return (Vec)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)a);
}
FT_INLINE Vec estimate_reciprocal_sqrt(Vec a) {
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return (Vec)_mm512_maskz_rsqrt14_ps(some, (__m512)a);
}
FT_INLINE bool all_finite(Vec a) {
  constexpr int kNanOrInfinite = 0x99;
  return _mm512_fpclass_ps_mask((__m512)a, kNanOrInfinite) == 0;
}
#endif
FT_INLINE Vec abs(Vec a) { return as<Vec>(as<UVec>(a) & 0x7fffffffu); }

// The sum of all lanes, in one fixed order: halves, quarters, …
FT_INLINE float sum(Vec v) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  __m256 halves[2];
  store_bits(halves, v);
  const __m256 half = halves[0] + halves[1];
#elif defined(__AVX2__)
  const __m256 half = (__m256)v;
#endif
#if defined(__AVX2__)
  const __m128 x = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#else
  const __m128 x = (__m128)v;
#endif
  const __m128 pair = x + _mm_movehl_ps(x, x);
  return pair[0] + pair[1];
#else
  float t[kWidth];
  store_bits(t, v);
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) t[i] += t[i + step];
  }
  return t[0];
#endif
}

// The lanes as doubles, the lower half of them and the upper.
struct Doubles {
  DVec low, high;
};
FT_INLINE Doubles to_double(Vec v) {
#if defined(__AVX512F__)
  const __m256 high = (__m256)_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1);
  return {(DVec)_mm512_maskz_cvtps_pd(0xff, _mm512_castps512_ps256((__m512)v)),
          (DVec)_mm512_maskz_cvtps_pd(0xff, high)};
#elif defined(__AVX2__)
  return {(DVec)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (DVec)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#elif defined(__x86_64__)
  return {(DVec)_mm_cvtps_pd((__m128)v), (DVec)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v))};
#else
  return {(DVec)vcvt_f64_f32(vget_low_f32((float32x4_t)v)),
          (DVec)vcvt_high_f64_f32((float32x4_t)v)};
#endif
}

// The largest of all lanes; which one, where some are NaN, is not said.
FT_INLINE float largest_lane(Vec v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 halves[2];
  store_bits(halves, v);
  const __m256 half = _mm256_max_ps(halves[0], halves[1]);
#else
  const __m256 half = (__m256)v;
#endif
  const __m128 x = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return pair[0] > pair[1] ? pair[0] : pair[1];
#else
  float top = v[0];
  for (int i = 1; i < kWidth; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// Lane numbers 0, 1, 2, … and the mask of the lanes below n.
FT_INLINE IVec lane_numbers() {
  IVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}
FT_INLINE IVec lanes_below(int64_t n) {
  const int32_t clipped = n < 0 ? 0 : n > kWidth ? kWidth : static_cast<int32_t>(n);
  return lane_numbers() < clipped;
}

// 16-bit lanes as 32-bit lanes, and back for lanes below 2^16. __builtin_convertvector would be
// three to six instructions in GCC 12.
FT_INLINE UVec widen(HVec v) {
#if defined(__AVX512F__)
  return (UVec)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)v);
#elif defined(__AVX2__)
  return (UVec)_mm256_cvtepu16_epi32((__m128i)v);
#elif defined(__x86_64__)
  return (UVec)_mm_unpacklo_epi16(_mm_cvtsi64_si128(as<int64_t>(v)), _mm_setzero_si128());
#else
  return __builtin_convertvector(v, UVec);
#endif
}
FT_INLINE HVec narrow(UVec v) {
#if defined(__AVX512F__)
  return (HVec)_mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)v);
#elif defined(__AVX2__)
  const __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (HVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#elif defined(__x86_64__)
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)v, 16), 16);
  return as<HVec>(_mm_cvtsi128_si64(_mm_packs_epi32(extended, extended)));
#else
  return __builtin_convertvector(v, HVec);
#endif
}

// ---- Storage formats: load as float, store from float (round to nearest, ties to even).

FT_INLINE Vec to_float(HVec v, bf16) { return as<Vec>(widen(v) << 16); }
FT_INLINE HVec from_float(Vec v, bf16) {
#if defined(__AVX512BF16__)
  return (HVec)_mm512_cvtneps_pbh((__m512)v);
#else
  const UVec bits = as<UVec>(v);
  const UVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return narrow((rounded | as<UVec>(v != v)) >> 16);  // all ones are a NaN too
#endif
}

FT_INLINE Vec to_float(HVec v, fp16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)v);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)v);
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16((float16x4_t)v);
#else
  // Shift the fields into place and let one exact product move the exponent's bias (it makes
  // subnormals normal too); infinities and NaN get the largest exponent back.
  const UVec bits = widen(v);
  const UVec magnitude = (bits & 0x7fffu) << 13;
  Vec f = as<Vec>(magnitude) * 0x1p112f;
  f = as<Vec>(as<UVec>(f) | (magnitude >= (0x7c00u << 13) ? UVec{} + 0x7f800000u : UVec{}));
  return as<Vec>(as<UVec>(f) | ((bits & 0x8000u) << 16));
#endif
}
FT_INLINE HVec from_float(Vec v, fp16) {
#if defined(__AVX512F__)
  return (HVec)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)v,
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (HVec)vcvt_f16_f32((float32x4_t)v);
#else
  const UVec bits = as<UVec>(v), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Normal results: move the bias and round in integers; a carry into the exponent is right.
  const UVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the mantissa, and the adder rounds.
  const UVec subnormal = as<UVec>(as<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  UVec half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? UVec{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? UVec{} + 0x7e00u : half;
  return narrow(half | (sign >> 16));
#endif
}

FT_INLINE Vec load(const float* p) { return load_bits<Vec>(p); }
FT_INLINE void store(float* p, Vec v) { store_bits(p, v); }
template <typename T>
FT_INLINE Vec load(const T* p) {
  return to_float(load_bits<HVec>(p), T{});
}
template <typename T>
FT_INLINE void store(T* p, Vec v) {
  store_bits(p, from_float(v, T{}));
}

// Two neighbours: as one whole cache line, where 16-bit elements would make two stores of it.
template <typename T>
FT_INLINE void store_pair(T* p, Vec low, Vec high) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    return store_bits(p, _mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
#endif
  store(p, low);
  store(p + kWidth, high);
}

// The first n elements (0 <= n <= kWidth): memory beyond them is neither read nor written, lanes
// beyond them are zero.
template <typename T>
FT_INLINE Vec load(const T* p, int64_t n) {
  if (n >= kWidth) return load(p);
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    return (Vec)_mm512_maskz_loadu_ps(mask, p);
  } else {
    return to_float((HVec)_mm256_maskz_loadu_epi16(mask, p), T{});
  }
#else
  T t[kWidth] = {};
  std::memcpy(t, p, n * sizeof(T));
  return load(t);
#endif
}
template <typename T>
FT_INLINE void store(T* p, Vec v, int64_t n) {
  if (n >= kWidth) return store(p, v);
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)from_float(v, T{}));
  }
#else
  T t[kWidth];
  store(t, v);
  std::memcpy(p, t, n * sizeof(T));
#endif
}

// Whole numbers, as weights of int8 are.
FT_INLINE Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i v = load_bits<__m128i>(p);
  return (Vec)_mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepi8_epi32(kAllLanes, v));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_bits<int64_t>(p))));
#else
  typedef int8_t BVec __attribute__((vector_size(kWidth)));
  return __builtin_convertvector(load_bits<BVec>(p), Vec);
#endif
}
FT_INLINE Vec load(const int8_t* p, int64_t n) {
  if (n >= kWidth) return load(p);
  int8_t t[kWidth] = {};
  std::memcpy(t, p, n);
  return load(t);
}

// ---- 2^x for x <= 127, on 2^x = 2^n 2^f with n = round(x) and |f| <= 1/2.

// Minimax polynomials of 2^f, exact at f = 0. kDegree 6: relative error 2e-9, so the rounding of
// its last steps is what is left, about 1 ulp. kDegree 4: 3e-6, far below bf16's rounding,
// for what is rounded to bf16 at once.
// `times`, a power of two, multiplies the result.
template <int kDegree>
FT_INLINE Vec exp2_fraction(Vec f, float times = 1.0f) {
  static_assert(kDegree == 4 || kDegree == 6);
  const auto coefficient = [&](float c) { return broadcast(c * times); };
  Vec p;
  if constexpr (kDegree == 6) {
    p = fma(coefficient(1.535336199e-04f), f, coefficient(1.339887445e-03f));
    p = fma(p, f, coefficient(9.618437358e-03f));
    p = fma(p, f, coefficient(5.550332471e-02f));
    p = fma(p, f, coefficient(2.402264791e-01f));
    p = fma(p, f, coefficient(6.931472029e-01f));
  } else {
    p = fma(coefficient(9.582855095e-03f), f, coefficient(5.590643033e-02f));
    p = fma(p, f, coefficient(2.402409861e-01f));
    p = fma(p, f, coefficient(6.931241928e-01f));
  }
  return fma(p, f, coefficient(1.0f));
}

// Adding 1.5 * 2^23 rounds to an integer n and leaves n + 127 in the low bits. Shifted into the
// exponent's field they are the float 2^n; with n = -127 the field is 0, which is the float 0. So
// what was clamped to -127 before contributes nothing.
inline constexpr float kExp2Magic = 0x1.8p23f + 127.0f;

inline constexpr float kLog2E = 1.44269504088896340736f;

// Calls `f` with a value of the storage type.
template <typename F>
void with_storage(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) return f(bf16{});
  if (dtype == DType::kFloat16) return f(fp16{});
  return f(float{});
}

}  // namespace ft::FT_ISA
