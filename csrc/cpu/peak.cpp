// The limits of one core on this instruction set, to print beside what a kernel reaches.
//
// Arithmetic: the microkernel's own multiply-add on registers alone. Memory: the plainest loop that
// loads, or loads and stores, every byte of a buffer; its size says which cache is measured. A
// plain store reads the line that it changes; a streaming one does not, and leaves no copy in the
// caches. Each figure is the best of several short runs, since whatever disturbs a run only slows
// it down.
#include <algorithm>
#include <chrono>

#include "gemm.h"
#include "kernels.h"
#include "scratch.h"
#include "streaming.h"

namespace ft::FT_ISA {
namespace {

// Chains of dependent multiply-adds. Latency (up to 8 cycles where a multiply and an add are two
// instructions) times issue width (2) asks for 16; 16 registers leave room for 14 and two operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 28;
#else
constexpr int kChains = 14;
#endif
constexpr int kRuns = 7;
constexpr double kRunSeconds = 0.01;

// The accumulator is a factor, or the product would be the same every time and leave the loop.
FT_INLINE Vec step(FloatDot, Vec acc, Vec a, Vec b) { return fma(acc, a, b); }
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
FT_INLINE Vec step(BFloat16Dot, Vec acc, UVec a, UVec b) {
  return BFloat16Dot::multiply_add(a, b, acc);
}
#endif

// The value is used, as far as the compiler can tell.
template <typename T>
FT_INLINE void keep(const T& value) {
  asm volatile("" : : "m"(value) : "memory");
}

// Units of work a second: `body(repeat)` does `repeat` times `units`.
template <typename Body>
double best_rate(double units, const Body& body) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [&](int64_t repeat) {
    const auto start = Clock::now();
    body(repeat);
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  int64_t repeat = 1;
  while (seconds(repeat) < kRunSeconds) repeat *= 2;
  double best = seconds(repeat);
  for (int run = 1; run < kRuns; ++run) best = std::min(best, seconds(repeat));
  return units * static_cast<double>(repeat) / best;
}

template <typename D>
double multiply_add_rate(typename D::Lane a, typename D::Lane b) {
  constexpr int kSteps = 64;
  const double flops = 2.0 * kWidth * D::kPerLane * kChains * kSteps;
  return best_rate(flops, [&](int64_t repeat) {
    const auto va = D::broadcast_lane(a), vb = D::broadcast_lane(b);
    Vec acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = broadcast(1.0f + static_cast<float>(i));
    for (int64_t r = 0; r < repeat * kSteps; ++r) {
#pragma GCC unroll 28
      for (int i = 0; i < kChains; ++i) acc[i] = step(D{}, acc[i], va, vb);
    }
    keep(acc);
  });
}

constexpr int kAtOnce = 8;  // vectors in flight; hides the latency of one load
constexpr int64_t kBlock = kAtOnce * sizeof(Vec);

// Two neighbours at a time, as aarch64's only store past the caches takes them.
struct CachedStore {
  static FT_INLINE void pair(char* to, UVec first, UVec second) {
    store_bits(to, first);
    store_bits(to + sizeof(UVec), second);
  }
  static void finish() {}
};

template <typename Store>
double copy_rate(int64_t bytes) {
  const int64_t half = std::max(kBlock, bytes / 2 / kBlock * kBlock);
  Scratch scratch(2 * Scratch::bytes<char>(half));
  char *from = scratch.take<char>(half), *to = scratch.take<char>(half);
  std::fill(from, from + half, char{1});
  std::fill(to, to + half, char{0});
  return best_rate(2.0 * static_cast<double>(half), [&](int64_t repeat) {
    for (int64_t r = 0; r < repeat; ++r) {
      for (int64_t at = 0; at < half; at += kBlock) {
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; i += 2) {
          const int64_t offset = at + i * static_cast<int64_t>(sizeof(UVec));
          Store::pair(to + offset, load_bits<UVec>(from + offset),
                      load_bits<UVec>(from + offset + sizeof(UVec)));
        }
      }
      Store::finish();
      keep(*to);
    }
  });
}

}  // namespace

double peak_flops(DType dtype) {
#if defined(__AMX_BF16__)
  if (dtype == DType::kBFloat16) {
    const MatrixUnit unit;
    return best_rate(kStepFlops, multiply_registers_amx);
  }
#elif defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return multiply_add_rate<BFloat16Dot>(0x3f803f80u, 0x2f802f80u);
#endif
  (void)dtype;  // arithmetic in float, whatever is stored
  return multiply_add_rate<FloatDot>(0.5f, 1.0f);
}

double read_bandwidth(int64_t bytes) {
  bytes = std::max(kBlock, bytes / kBlock * kBlock);
  Scratch scratch(Scratch::bytes<char>(bytes));
  char* data = scratch.take<char>(bytes);
  std::fill(data, data + bytes, char{1});
  return best_rate(static_cast<double>(bytes), [&](int64_t repeat) {
    UVec sum[kAtOnce] = {};
    for (int64_t r = 0; r < repeat; ++r) {
      for (int64_t at = 0; at < bytes; at += kBlock) {
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) sum[i] += load_bits<UVec>(data + at + i * sizeof(Vec));
      }
      keep(sum);
    }
  });
}

double copy_bandwidth(int64_t bytes) { return copy_rate<CachedStore>(bytes); }

double streaming_bandwidth(int64_t bytes) { return copy_rate<StreamingStore>(bytes); }

}  // namespace ft::FT_ISA
