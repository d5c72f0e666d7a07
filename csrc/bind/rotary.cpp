// rotary: tensors in, params struct out. Its schema is in library.cpp.
#include "../common/rotary.h"

#include <algorithm>

#include "tensor.h"

namespace ft::bind {
namespace {

// Dense, with the shape of `like` and its dimensions in the order in which they lie in memory.
Tensor empty_as(const Tensor& like) {
  int order[] = {0, 1, 2};
  std::stable_sort(order, order + 3, [&](int a, int b) { return like.stride(a) > like.stride(b); });
  return empty({like.size(0), like.size(1), like.size(2), like.size(3)}, scalar_type(like),
               {order[0], order[1], order[2], 3});
}

// cos or sin as (batch, length, pairs).
View<2> table_view(const char* name, const Tensor& t, const RotaryParams& p, const Tensor& cos) {
  const int64_t dims = t.dim(), rows = dims == 3 ? t.size(0) : 1;
  STD_TORCH_CHECK((dims == 2 || dims == 3) && (rows == 1 || rows == p.batch) &&
                      t.size(dims - 2) == p.length && t.size(dims - 1) == p.pairs &&
                      scalar_type(t) == scalar_type(cos),
                  "rotary: ", name, " must be (", p.length, ", ", p.pairs, ") or (", p.batch, ", ",
                  p.length, ", ", p.pairs, ") of the dtype of cos");
  STD_TORCH_CHECK(t.stride(dims - 1) == 1 || p.pairs <= 1 || t.numel() == 0, "rotary: ", name,
                  " must have a contiguous last dimension");
  return {t.const_data_ptr(), {rows == 1 ? 0 : t.stride(0), t.stride(dims - 2)}};
}

Tensor add(RotaryParams& p, Rotated& of, const char* name, const Tensor& x, const Tensor& query) {
  const int64_t heads = x.dim() == 4 ? x.size(1) : 0;
  of.in = heads_view("rotary", name, x, p.batch, heads, p.length, p.dim, query);
  Tensor out = empty_as(x);
  of.out = heads_view(out);
  of.heads = heads;
  return out;
}

std::tuple<Tensor, Tensor> rotary(Tensor query, OptionalTensor key, Tensor cos, Tensor sin,
                                  bool interleaved, bool inverse) {
  STD_TORCH_CHECK(query.dim() == 4, "rotary: query must be (batch, heads, length, head_dim)");
  RotaryParams p;
  p.dtype = dtype(query);
  p.table_dtype = dtype(cos);
  STD_TORCH_CHECK(p.dtype != DType::kBool && p.table_dtype != DType::kBool,
                  "rotary: query, cos and sin must be floating tensors");
  p.batch = query.size(0);
  p.length = query.size(2);
  p.dim = query.size(3);
  p.pairs = cos.dim() > 0 ? cos.size(cos.dim() - 1) : 0;
  STD_TORCH_CHECK(2 * p.pairs <= p.dim, "rotary: cos has ", p.pairs, " columns, head_dim is ",
                  p.dim, ": it must be at least twice as many");
  p.cos = table_view("cos", cos, p, cos);
  p.sin = table_view("sin", sin, p, cos);
  Tensor out = add(p, p.of[0], "query", query, query);
  Tensor out_key = key ? add(p, p.of[1], "key", *key, query) : nothing(scalar_type(query));
  p.interleaved = interleaved;
  p.inverse = inverse;
  kernels().rotary(p, torch_threads());
  return {out, out_key};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("rotary", TORCH_BOX(&ft::bind::rotary));
}
