// How a kernel spreads fixed units of work over the host's thread pool without knowing the host.
//
// Each unit writes its own part of the output, and no sum is cut by the number of threads or units:
// so who runs a unit, and when, cannot change a bit of the result.
#pragma once
#include <atomic>
#include <cstdint>

#include "../common/parallel.h"

namespace ft::FT_ISA {

// Unit numbers, in one contiguous share for each thread. Whoever has finished its own goes on with
// another's, so a slow thread does not hold up the rest. Successive loops over the same rows give a
// thread the same ones, which it still has in its cache.
class Shares {
 public:
  Shares(int64_t count, int64_t threads) : count_(threads < kMost ? threads : kMost) {
    for (int64_t i = 0; i < count_; ++i) {
      shares_[i].next.store(count * i / count_, std::memory_order_relaxed);
      shares_[i].end = count * (i + 1) / count_;
    }
  }
  int64_t count() const { return count_; }
  // The next unit of `share`, or of the first one after it that has any, which becomes `share`.
  bool next(int64_t& share, int64_t& unit) {
    for (int64_t tried = 0; tried < count_; ++tried) {
      unit = shares_[share].next.fetch_add(1, std::memory_order_relaxed);
      if (unit < shares_[share].end) return true;
      share = share + 1 < count_ ? share + 1 : 0;
    }
    return false;
  }

 private:
  static constexpr int64_t kMost = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Share shares_[kMost];
  const int64_t count_;
};

// What a worker draws from.
class Units {
 public:
  Units(Shares& shares, int64_t first) : shares_(shares), share_(first % shares.count()) {}
  bool next(int64_t& unit) { return shares_.next(share_, unit); }

 private:
  Shares& shares_;
  int64_t share_;
};

// Calls `worker(units)` once on each of at most min(threads, count) threads. A worker allocates its
// scratch once, then draws units. Workers must not throw.
template <typename Worker>
void for_units(const Parallel& parallel, int64_t count, const Worker& worker) {
  if (count <= 0) return;
  const int64_t threads = count < parallel.threads ? count : parallel.threads;
  Shares shares(count, threads);
  if (threads == 1) {
    Units units(shares, 0);
    worker(units);
    return;
  }
  struct Context {
    const Worker& worker;
    Shares& shares;
  } context{worker, shares};
  parallel.run(
      threads,
      [](int64_t first, int64_t, void* c) {
        auto& context = *static_cast<Context*>(c);
        Units units(context.shares, first);
        context.worker(units);
      },
      &context);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ft::FT_ISA
