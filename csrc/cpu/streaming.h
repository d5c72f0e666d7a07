// Stores that go past the caches: a line that is wholly written need not be read first.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace ft::FT_ISA {

// Two neighbours at a time, as aarch64's only store past the caches takes them. Elsewhere each must
// be aligned.
struct StreamingStore {
  static FT_INLINE void pair(char* to, UVec first, UVec second) {
#if defined(__aarch64__)
    asm volatile("stnp %q1, %q2, [%0]" : : "r"(to), "w"(first), "w"(second) : "memory");
#else
    one(to, first);
    one(to + sizeof(UVec), second);
#endif
  }
#if defined(__aarch64__)
  static void finish() {}
#else
  static void finish() { _mm_sfence(); }  // until it has left the core, it is not written

 private:
  static FT_INLINE void one(char* to, UVec v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#endif
  }
#endif
};

inline void fill_zeros_streaming(void* data, int64_t bytes) {
  constexpr int64_t kPair = 2 * sizeof(UVec), kLine = kPair > 64 ? kPair : 64;
  char* at = static_cast<char*>(data);
  char* const end = at + bytes;
  const int64_t before = -reinterpret_cast<intptr_t>(at) & (kLine - 1);
  if (bytes < before + kLine) {
    std::memset(at, 0, bytes);
    return;
  }
  std::memset(at, 0, before);
  for (at += before; at + kPair <= end; at += kPair) StreamingStore::pair(at, UVec{}, UVec{});
  std::memset(at, 0, end - at);
  StreamingStore::finish();
}

}  // namespace ft::FT_ISA
