// The host's thread pool as kernels see it.
#pragma once
#include <cstdint>

namespace ft {

// The host's pool as plain C: run `body(begin, end, context)` over [0, n), at most `threads`
// pieces.
struct Parallel {
  int64_t threads = 1;
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

}  // namespace ft
