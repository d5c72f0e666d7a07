// What the embedding kernels are told: h = word[id] + position[p] + type[t] for every token,
// out = dropout((h - mean) * rstd * weight + bias).
#pragma once
#include "philox.h"
#include "types.h"

namespace ft {

// Rows to choose from, and which of them each token chooses.
struct EmbeddingTable {
  RowsView rows;  // (count, channels)
  int64_t count = 0;
  const int64_t* ids = nullptr;  // of each token, in [0, count); absent: token % period
  int64_t period = 1;

  int64_t id(int64_t token) const { return ids ? ids[token] : token % period; }
};

inline constexpr int kEmbeddingTables = 3;

struct EmbeddingParams {
  DType dtype = DType::kFloat32;  // of the tables and of out
  DType weight_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  int64_t tokens = 0, channels = 0;
  EmbeddingTable tables[kEmbeddingTables];  // of words, positions, types; those after may be absent
  const void* weight = nullptr;
  const void* bias = nullptr;
  RowsView out;
  float *mean = nullptr, *rstd = nullptr;  // (tokens,)
  float eps = 1e-12f;
  Dropout dropout;
};

struct EmbeddingGradParams {
  DType dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
  int64_t tokens = 0, channels = 0;
  EmbeddingTable tables[kEmbeddingTables];
  const void* weight = nullptr;
  RowsView grad_out;
  const float *mean = nullptr, *rstd = nullptr;
  void* dtables[kEmbeddingTables] = {};  // (count, channels) of dtype, contiguous; may be absent
  int64_t padding[kEmbeddingTables] = {-1, -1, -1};  // the row whose gradient is zero
  float *dweight = nullptr, *dbias = nullptr;        // (channels,), either may be absent
  Dropout dropout;
};

}  // namespace ft
