// Rotary position embeddings (Su et al. 2021, eq. 34) of query and key, and their gradient, which
// is the rotation by the negative angle. Each row is read once and written once, three FLOPs an
// element: bytes are the cost. A unit of work is a few positions of one sequence: their cosines and
// sines are laid out in L1 as the rows need them, and serve every head.
#include "../common/rotary.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace ft::FT_ISA {
namespace {

// Of one head in a unit: where a head's rows lie together they are a page of memory, and the
// unit's cosines and sines, at most eight bytes for a column of two, take half of L1 at most.
constexpr int64_t kHeadBytes = 4096;

int64_t unit_rows(const RotaryParams& p) {
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  return std::max<int64_t>(1, kHeadBytes / std::max<int64_t>(1, p.dim * element));
}

// In a 64-bit lane the neighbours of a pair are its low and its high half (little endian).
FT_INLINE Vec swap_neighbours(Vec v) {
  const U64Vec pairs = as<U64Vec>(v);
  return as<Vec>((pairs << 32) | (pairs >> 32));
}
// Lanes 0 … kWidth / 2 of memory, each twice.
FT_INLINE Vec load_twice(const float* p) {
  typedef uint32_t Half __attribute__((vector_size(2 * kWidth)));
  const U64Vec wide = __builtin_convertvector(load_bits<Half>(p), U64Vec);
  return as<Vec>(wide | (wide << 32));
}
FT_INLINE Vec negate_first_of_pairs(Vec v) {
  return as<Vec>(as<U64Vec>(v) ^ (U64Vec{} + 0x80000000u));
}

// Rotates rows of one layout with cosines and sines that were made for it. `width` floats of each
// belong to a row.
struct Halves {
  static int64_t width(int64_t pairs) { return round_up(pairs, kWidth); }

  template <typename Table>
  static FT_INLINE void lay_out(const Table* cos, const Table* sin, float sign, int64_t pairs,
                                float*, float* cosines, float* sines) {
    for (int64_t j = 0; j < pairs; j += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, pairs - j);
      store(cosines + j, load(cos + j, n));
      store(sines + j, load(sin + j, n) * sign);
    }
  }

  template <typename T>
  static FT_INLINE void rotate(const T* x, T* out, const float* cosines, const float* sines,
                               int64_t pairs) {
    int64_t j = 0;
    for (; j + 2 * kWidth <= pairs; j += 2 * kWidth) {
      const Pair low(x, cosines, sines, j, pairs, kWidth);
      const Pair high(x, cosines, sines, j + kWidth, pairs, kWidth);
      store_pair(out + j, low.a, high.a);
      store_pair(out + pairs + j, low.b, high.b);
    }
    for (; j < pairs; j += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, pairs - j);
      const Pair turned(x, cosines, sines, j, pairs, n);
      store(out + j, turned.a, n);
      store(out + pairs + j, turned.b, n);
    }
  }

 private:
  struct Pair {
    Vec a, b;

    template <typename T>
    FT_INLINE Pair(const T* x, const float* cosines, const float* sines, int64_t j, int64_t pairs,
                   int64_t n) {
      const Vec from_a = load(x + j, n), from_b = load(x + pairs + j, n);
      const Vec c = load(cosines + j), s = load(sines + j);
      a = from_a * c - from_b * s;
      b = from_b * c + from_a * s;
    }
  };
};

struct Interleaved {
  static int64_t width(int64_t pairs) { return round_up(2 * pairs, 2 * kWidth); }

  template <typename Table>
  static FT_INLINE void lay_out(const Table* cos, const Table* sin, float sign, int64_t pairs,
                                float* buffer, float* cosines, float* sines) {
    for (int64_t j = 0; j < pairs; j += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, pairs - j);
      store(buffer, load(cos + j, n));
      store(buffer + kWidth, load(sin + j, n) * sign);
      for (int half = 0; half < 2; ++half) {
        const int64_t from = half * kWidth / 2, to = 2 * j + half * kWidth;
        store(cosines + to, load_twice(buffer + from));
        store(sines + to, negate_first_of_pairs(load_twice(buffer + kWidth + from)));
      }
    }
  }

  template <typename T>
  static FT_INLINE void rotate(const T* x, T* out, const float* cosines, const float* sines,
                               int64_t pairs) {
    const auto turned = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      const Vec v = load(x + j, n);
      return v * load(cosines + j) + swap_neighbours(v) * load(sines + j);
    };
    const int64_t columns = 2 * pairs;
    int64_t j = 0;
    for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
      store_pair(out + j, turned(j, kWidth), turned(j + kWidth, kWidth));
    }
    for (; j < columns; j += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, columns - j);
      store(out + j, turned(j, n), n);
    }
  }
};

// The columns that do not turn, bit for bit.
template <typename T>
FT_INLINE void pass_through(const T* x, T* out, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + kWidth <= end; j += kWidth) std::memcpy(out + j, x + j, kWidth * sizeof(T));
  if (j < end) std::memcpy(out + j, x + j, (end - j) * sizeof(T));
}

// What one thread needs for it.
template <typename Layout, typename T>
class Worker {
 public:
  explicit Worker(const RotaryParams& p)
      : p_(p),
        width_(Layout::width(p.pairs)),
        scratch_(2 * Scratch::bytes<float>(unit_rows(p) * width_) +
                 Scratch::bytes<float>(2 * kWidth)),
        cosines_(scratch_.take<float>(unit_rows(p) * width_)),
        sines_(scratch_.take<float>(unit_rows(p) * width_)),
        buffer_(scratch_.take<float>(2 * kWidth)) {}

  // Positions [begin, end) of sequence b.
  void run(int64_t b, int64_t begin, int64_t end) const {
    with_storage(p_.table_dtype, [&](auto storage) {
      using Table = decltype(storage);
      const float sign = p_.inverse ? -1.0f : 1.0f;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = (t - begin) * width_;
        Layout::lay_out(table<Table>(p_.cos, b, t), table<Table>(p_.sin, b, t), sign, p_.pairs,
                        buffer_, cosines_ + at, sines_ + at);
      }
    });
    for (const Rotated& of : p_.of) {
      // in the order of memory
      if (of.out.stride[1] > of.out.stride[2]) {
        for (int64_t h = 0; h < of.heads; ++h) {
          rotate_rows<true>(of, row<T>(of.in, b, h, begin), mutable_row<T>(of.out, b, h, begin), 0,
                            end - begin);
        }
      } else {
        for (int64_t t = begin; t < end; ++t) {
          rotate_rows<false>(of, row<T>(of.in, b, 0, t), mutable_row<T>(of.out, b, 0, t), t - begin,
                             of.heads);
        }
      }
    }
  }

 private:
  // Rows of one head at successive positions, or of successive heads at one position.
  template <bool kPositions>
  FT_INLINE void rotate_rows(const Rotated& of, const T* x, T* out, int64_t at,
                             int64_t count) const {
    constexpr int kDim = kPositions ? 2 : 1;
    const int64_t from = of.in.stride[kDim], to = of.out.stride[kDim];
    const float *cosines = cosines_ + at * width_, *sines = sines_ + at * width_;
    const int64_t pairs = p_.pairs, dim = p_.dim, step = kPositions ? width_ : 0;
    for (int64_t i = 0; i < count; ++i) {
      Layout::rotate(x, out, cosines, sines, pairs);
      pass_through(x, out, 2 * pairs, dim);
      x += from;
      out += to;
      cosines += step;
      sines += step;
    }
  }

  template <typename Table>
  static const Table* table(const View<2>& v, int64_t b, int64_t t) {
    return static_cast<const Table*>(v.data) + b * v.stride[0] + t * v.stride[1];
  }

  const RotaryParams& p_;
  const int64_t width_;
  Scratch scratch_;
  float *const cosines_, *const sines_, *const buffer_;
};

template <typename Layout, typename T>
void rotate(const RotaryParams& p, const Parallel& parallel) {
  const int64_t rows = unit_rows(p), blocks = ceil_div(p.length, rows);
  for_units(parallel, p.batch * blocks, [&](Units& units) {
    const Worker<Layout, T> worker(p);
    int64_t unit;
    while (units.next(unit)) {
      const int64_t begin = unit % blocks * rows;
      worker.run(unit / blocks, begin, std::min(p.length, begin + rows));
    }
  });
}

}  // namespace

void rotary(const RotaryParams& p, const Parallel& parallel) {
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    p.interleaved ? rotate<Interleaved, T>(p, parallel) : rotate<Halves, T>(p, parallel);
  });
}

}  // namespace ft::FT_ISA
