// The weight and bias behind a norm: as floats, and the sums over rows that are their gradients.
#pragma once
#include <algorithm>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace ft::FT_ISA {

// weight or bias as floats: where it is, or written to `buffer`, or `absent` everywhere.
inline const float* parameter(const void* data, DType dtype, float absent, int64_t channels,
                              float* buffer) {
  if (!data) {
    std::fill_n(buffer, channels, absent);
    return buffer;
  }
  if (dtype == DType::kFloat32) return static_cast<const float*>(data);
  with_storage(dtype, [&](auto storage) {
    const auto* from = static_cast<const decltype(storage)*>(data);
    for (int64_t j = 0; j < channels; j += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, channels - j);
      store(buffer + j, load(from + j, n), n);
    }
  });
  return buffer;
}

// dweight and dbias. Sums over rows are taken chunk by chunk, and the chunks' sums in order and in
// double: the same bits for every number of threads. At most 64 rows a chunk, so that few values
// meet in one float; at least 16, so that the chunks' sums are little beside the rows; between them
// 128 chunks, which keep many threads busy. Narrow rows cost little and have few columns to even
// out an unlucky rounding: two rows a chunk do for them.
class AffineGradient {
 public:
  AffineGradient(int64_t rows, int64_t channels)
      : chunk_rows_(std::clamp<int64_t>(ceil_div(rows, 128), channels < 64 ? 2 : 16, 64)),
        chunks_(std::max<int64_t>(1, ceil_div(rows, chunk_rows_))),  // without rows: zeros
        rows_(rows),
        channels_(channels),
        width_(round_up(channels, kColumns)),
        scratch_(Scratch::bytes<float>(2 * chunks_ * width_)),
        sums_(scratch_.take<float>(2 * chunks_ * width_)) {}

  // Calls `run(begin, end, dweight, dbias)` of what `make()` makes for a thread, to add the shares
  // of these rows to the two. At least `unit_rows` rows make a unit of work.
  template <typename Make>
  void add_rows(const Parallel& parallel, int64_t unit_rows, const Make& make) {
    const int64_t unit_chunks = ceil_div(unit_rows, chunk_rows_);
    for_units(parallel, ceil_div(chunks_, unit_chunks), [&](Units& units) {
      const auto worker = make();
      for (int64_t unit; units.next(unit);) {
        const int64_t last = std::min(chunks_, (unit + 1) * unit_chunks);
        for (int64_t c = unit * unit_chunks; c < last; ++c) {
          float *dweight = sums_ + 2 * c * width_, *dbias = dweight + width_;
          std::fill_n(dweight, 2 * width_, 0.0f);
          worker.run(c * chunk_rows_, std::min(rows_, (c + 1) * chunk_rows_), dweight, dbias);
        }
      }
    });
  }

  // Either may be absent.
  void finish(const Parallel& parallel, float* dweight, float* dbias) const {
    if (!dweight && !dbias) return;
    // waking a thread takes about as long as to read so much
    const int64_t block = round_up(ceil_div(int64_t{32} << 10, 8 * chunks_), kColumns);
    for_units(parallel, ceil_div(channels_, block), [&](Units& units) {
      for (int64_t unit; units.next(unit);) {
        const int64_t end = std::min(channels_, (unit + 1) * block);
        for (int64_t j = unit * block; j < end; j += kColumns) {
          double of_weight[kColumns] = {}, of_bias[kColumns] = {};
          for (int64_t c = 0; c < chunks_; ++c) {
            const float *w = sums_ + 2 * c * width_ + j, *b = w + width_;
            for (int i = 0; i < kColumns; ++i) of_weight[i] += w[i];
            for (int i = 0; i < kColumns; ++i) of_bias[i] += b[i];
          }
          const int64_t n = std::min(kColumns, end - j);
          if (dweight) std::copy_n(of_weight, n, dweight + j);
          if (dbias) std::copy_n(of_bias, n, dbias + j);
        }
      }
    });
  }

 private:
  static constexpr int64_t kColumns = 64;  // that are added up at a time

  const int64_t chunk_rows_, chunks_, rows_, channels_, width_;
  Scratch scratch_;
  float* const sums_;
};

}  // namespace ft::FT_ISA
