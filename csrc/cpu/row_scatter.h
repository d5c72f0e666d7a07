// Adds the rows of a matrix into the rows of a table that they chose: the gradient of a gather.
#pragma once
#include <algorithm>
#include <cstring>

#include "../common/embedding.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "streaming.h"

namespace ft::FT_ISA {

// The tokens that chose a row, in order, for every row of a table: a counting sort.
class TokensByRow {
 public:
  // Those that chose row `padding` are left out.
  TokensByRow(const EmbeddingTable& table, int64_t tokens, int64_t padding)
      : scratch_(Scratch::bytes<int64_t>(table.count + 2) + Scratch::bytes<int64_t>(tokens)),
        ends_(scratch_.take<int64_t>(table.count + 2)),
        tokens_(scratch_.take<int64_t>(tokens)) {
    std::fill_n(ends_, table.count + 2, 0);
    // Counted two places on, the sums give the row's start one place on; there it grows to its end.
    for (int64_t t = 0; t < tokens; ++t) ++ends_[table.id(t) + 2];
    if (padding >= 0) ends_[padding + 2] = 0;
    for (int64_t i = 2; i < table.count + 2; ++i) ends_[i] += ends_[i - 1];
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t id = table.id(t);
      if (id != padding) tokens_[ends_[id + 1]++] = t;
    }
  }
  const int64_t* of(int64_t row) const { return tokens_ + ends_[row]; }
  int64_t count(int64_t row) const { return ends_[row + 1] - ends_[row]; }

 private:
  Scratch scratch_;
  int64_t *const ends_, *const tokens_;
};

// Columns [begin, end) of the sum of some rows of `from`, which lie `channels` apart. A float takes
// kSteps values at most, and a double takes the floats.
template <typename T>
void sum_of_rows(const T* from, int64_t channels, const int64_t* rows, int64_t count, int64_t begin,
                 int64_t end, T* to) {
  constexpr int64_t kSteps = 64, kVectors = 4, kColumns = kVectors * kWidth;
  for (int64_t j = begin; j < end; j += kColumns) {
    double totals[kColumns] = {};
    Vec sums[kVectors];
    for (int64_t first = 0; first < count; first += kSteps) {
      const int64_t last = std::min(count, first + kSteps);
      for (Vec& sum : sums) sum = zero();
      if (j + kColumns <= end) {
        for (int64_t i = first; i < last; ++i) {
          const T* row = from + rows[i] * channels + j;
          for (int v = 0; v < kVectors; ++v) sums[v] += load(row + v * kWidth);
        }
      } else {
        for (int64_t i = first; i < last; ++i) {
          const T* row = from + rows[i] * channels;
          for (int64_t v = 0, k = j; k < end; ++v, k += kWidth) sums[v] += load(row + k, end - k);
        }
      }
      if (count > kSteps) {
        for (int i = 0; i < kColumns; ++i) totals[i] += sums[i / kWidth][i % kWidth];
      }
    }
    for (int64_t v = 0, k = j; k < end; ++v, k += kWidth) {
      if (count > kSteps) {
        for (int i = 0; i < kWidth; ++i) {
          sums[v][i] = static_cast<float>(totals[v * kWidth + i]);
        }
      }
      store(to + k, sums[v], std::min<int64_t>(kWidth, end - k));
    }
  }
}

// to (table.count, channels): in each row the sum of the rows of `from` (tokens, channels) that
// chose it, zeros where none did. A unit owns some rows, and a row that many chose is cut into
// columns: each sum is taken by one thread, in the order of tokens.
template <typename T>
void scatter_rows(const Parallel& parallel, const EmbeddingTable& table, int64_t tokens,
                  int64_t padding, const T* from, int64_t channels, T* to) {
  constexpr int64_t kUnitBytes = int64_t{64} << 10;
  constexpr int64_t kMany = 256;    // tokens that make a row's columns worth sharing out
  constexpr int64_t kColumns = 64;  // of a unit there
  // Zeros of a table that caches do not hold go past them: 23 GB/s where memset has 9, and whoever
  // reads them next is not slower for it (94 MB, Xeon with AMX).
  constexpr int64_t kLargeBytes = int64_t{16} << 20;
  const TokensByRow by_row(table, tokens, padding);
  const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
  const bool large = table.count * row_bytes >= kLargeBytes;
  const int64_t block = ceil_div(kUnitBytes, row_bytes);
  for_units(parallel, ceil_div(table.count, block), [&](Units& units) {
    for (int64_t unit; units.next(unit);) {
      const int64_t end = std::min(table.count, (unit + 1) * block);
      for (int64_t r = unit * block; r < end;) {
        int64_t next = r;
        while (next < end && by_row.count(next) == 0) ++next;
        const int64_t gap = (next - r) * row_bytes;
        large ? fill_zeros_streaming(to + r * channels, gap)
              : void(std::memset(to + r * channels, 0, gap));
        for (r = next; r < end && by_row.count(r) > 0; ++r) {
          const int64_t count = by_row.count(r);
          if (count == 1) {
            std::memcpy(to + r * channels, from + *by_row.of(r) * channels, row_bytes);
          } else if (count <= kMany) {
            sum_of_rows(from, channels, by_row.of(r), count, 0, channels, to + r * channels);
          }
        }
      }
    }
  });
  if (tokens <= kMany) return;
  Scratch scratch(Scratch::bytes<int64_t>(tokens / kMany));
  int64_t *rows = scratch.take<int64_t>(tokens / kMany), count = 0;
  for (int64_t r = 0; r < table.count; ++r) {
    if (by_row.count(r) > kMany) rows[count++] = r;
  }
  const int64_t parts = ceil_div(channels, kColumns);
  for_units(parallel, count * parts, [&](Units& units) {
    for (int64_t unit; units.next(unit);) {
      const int64_t r = rows[unit / parts], begin = unit % parts * kColumns;
      sum_of_rows(from, channels, by_row.of(r), by_row.count(r), begin,
                  std::min(channels, begin + kColumns), to + r * channels);
    }
  });
}

}  // namespace ft::FT_ISA
