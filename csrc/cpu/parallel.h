// How a kernel spreads fixed units of work over the host's thread pool without knowing the host.
//
// Units are cut from the problem alone, never from the number of threads, and each writes its own
// part of the output: so who runs a unit, and when, cannot change a bit of the result.
#pragma once
#include <atomic>
#include <cstdint>

#include "../common/parallel.h"

namespace ft::FT_ISA {

// Hands out unit numbers. Threads draw from it until it is empty, so a slow thread does not hold up
// the rest.
class Units {
 public:
  explicit Units(int64_t count) : count_(count) {}
  bool next(int64_t& unit) {
    unit = drawn_.fetch_add(1, std::memory_order_relaxed);
    return unit < count_;
  }

 private:
  std::atomic<int64_t> drawn_{0};
  const int64_t count_;
};

// Calls `worker(units)` once on each of at most min(threads, count) threads. A worker allocates its
// scratch once, then draws units. Workers must not throw.
template <typename Worker>
void for_units(const Parallel& parallel, int64_t count, const Worker& worker) {
  if (count <= 0) return;
  Units units(count);
  const int64_t threads = count < parallel.threads ? count : parallel.threads;
  if (threads == 1) {
    worker(units);
    return;
  }
  struct Context {
    const Worker& worker;
    Units& units;
  } context{worker, units};
  parallel.run(
      threads,
      [](int64_t, int64_t, void* c) {
        auto& context = *static_cast<Context*>(c);
        context.worker(context.units);
      },
      &context);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ft::FT_ISA
