// What the rotary kernel is told: each pair of columns (a, b) of a row turns by the angle of its
// position, a' = a cos - b sin, b' = b cos + a sin.
#pragma once
#include "types.h"

namespace ft {

// Query or key.
struct Rotated {
  int64_t heads = 0;
  HeadsView in, out;
};

struct RotaryParams {
  DType dtype = DType::kFloat32;
  DType table_dtype = DType::kFloat32;  // of cos and sin
  int64_t batch = 0, length = 0, dim = 0;
  int64_t pairs = 0;         // columns from 2 * pairs on pass through
  Rotated of[2];             // query and key; key may be absent: then it has no heads
  View<2> cos, sin;          // (batch, length, pairs)
  bool interleaved = false;  // pair j is (2j, 2j + 1), otherwise (j, j + pairs)
  bool inverse = false;      // turn by the negative angle, which is the gradient
};

}  // namespace ft
