// embedding_norm_fwd, embedding_norm_bwd: tensors in, params structs out. Their schemas are in
// library.cpp.
#include "../common/embedding.h"

#include <algorithm>

#include "tensor.h"

namespace ft::bind {
namespace {

// A table and each token's row of it. The ids become addresses, so they are looked at first.
EmbeddingTable table(const char* op, const char* name, const Tensor& t, const OptionalTensor& ids,
                     const char* ids_name, int64_t tokens, const Tensor& word) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == word.size(1) && scalar_type(t) == scalar_type(word),
                  op, ": ", name, " must be (rows, ", word.size(1), ") of word's dtype");
  EmbeddingTable found{rows_view(t), t.size(0), nullptr, 1};
  if (!ids) return found;
  STD_TORCH_CHECK(scalar_type(*ids) == aoti_torch_dtype_int64() && ids->is_contiguous() &&
                      ids->numel() == tokens,
                  op, ": ", ids_name, " must be contiguous int64, one for each token");
  found.ids = static_cast<const int64_t*>(ids->const_data_ptr());
  uint64_t largest = 0;  // negative ones are the largest of all
  for (int64_t i = 0; i < tokens; ++i) {
    largest = std::max(largest, static_cast<uint64_t>(found.ids[i]));
  }
  STD_TORCH_CHECK(tokens == 0 || largest < static_cast<uint64_t>(found.count), op, ": ", ids_name,
                  " holds ", static_cast<int64_t>(largest), ", but ", name, " has ", found.count,
                  " rows");
  return found;
}

// What both passes take.
struct Inputs {
  const Tensor &input_ids, &word;
  const OptionalTensor &position, &token_type, &position_ids, &token_type_ids;
};

template <typename Params>
void set_inputs(const char* op, Params& p, const Inputs& in) {
  STD_TORCH_CHECK(in.word.dim() == 2 && dtype(in.word) != DType::kBool, op,
                  ": word must be (rows, channels), floating");
  p.dtype = dtype(in.word);
  p.tokens = in.input_ids.numel();
  p.channels = in.word.size(1);
  p.tables[0] = table(op, "word", in.word, in.input_ids, "input_ids", p.tokens, in.word);
  if (in.position) {
    EmbeddingTable& of = p.tables[1];
    of = table(op, "position", *in.position, in.position_ids, "position_ids", p.tokens, in.word);
    const int64_t dims = in.input_ids.dim();
    of.period = std::max<int64_t>(1, dims > 0 ? in.input_ids.size(dims - 1) : 1);
    STD_TORCH_CHECK(of.ids || p.tokens == 0 || of.period <= of.count, op, ": position has ",
                    of.count, " rows for ", of.period, " positions");
  }
  if (in.token_type) {
    EmbeddingTable& of = p.tables[2];
    of = table(op, "token_type", *in.token_type, in.token_type_ids, "token_type_ids", p.tokens,
               in.word);
    STD_TORCH_CHECK(of.ids || p.tokens == 0 || of.count >= 1, op, ": token_type has no rows");
  }
}

// Contiguous, (…, channels) for ids of shape (…).
Tensor empty_for(const Tensor& ids, int64_t channels, int32_t type) {
  constexpr int kMaxDims = 64;
  const int dims = static_cast<int>(ids.dim()) + 1;
  STD_TORCH_CHECK(dims <= kMaxDims, "fast_transformer: expected at most 63 dimensions");
  int64_t size[kMaxDims], stride[kMaxDims], step = 1;
  for (int i = dims - 1; i >= 0; --i) {
    size[i] = i == dims - 1 ? channels : ids.size(i);
    stride[i] = step;
    step *= std::max<int64_t>(1, size[i]);
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size, stride, type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

OptionalTensor parameter(const char* op, const char* name, const OptionalTensor& t,
                         const Tensor& word) {
  if (!t) return t;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == word.size(1) &&
                      (scalar_type(*t) == scalar_type(word) || dtype(*t) == DType::kFloat32),
                  op, ": ", name, " must be (", word.size(1), ",), float32 or of word's dtype");
  return t->is_contiguous() ? t : OptionalTensor(torch::stable::contiguous(*t));
}

std::tuple<Tensor, Tensor> embedding_norm_fwd(Tensor input_ids, Tensor word,
                                              OptionalTensor position, OptionalTensor token_type,
                                              OptionalTensor weight, OptionalTensor bias,
                                              OptionalTensor position_ids,
                                              OptionalTensor token_type_ids, OptionalTensor seed,
                                              double eps, double dropout_p) {
  constexpr const char* op = "embedding_norm_fwd";
  EmbeddingParams p;
  set_inputs(op, p, {input_ids, word, position, token_type, position_ids, token_type_ids});
  weight = parameter(op, "weight", weight, word);
  bias = parameter(op, "bias", bias, word);
  Tensor out = empty_for(input_ids, p.channels, scalar_type(word));
  Tensor statistics = empty({2, p.tokens}, aoti_torch_dtype_float32());
  p.weight = data(weight);
  p.weight_dtype = weight ? dtype(*weight) : p.dtype;
  p.bias = data(bias);
  p.bias_dtype = bias ? dtype(*bias) : p.dtype;
  p.out = rows_view(out);
  p.mean = mutable_data<float>(statistics);
  p.rstd = p.mean + p.tokens;
  p.eps = static_cast<float>(eps);
  p.dropout = dropout(dropout_p, seed);
  kernels().embedding_norm_fwd(p, torch_threads());
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_norm_bwd(
    Tensor grad_out, Tensor statistics, Tensor input_ids, Tensor word, OptionalTensor position,
    OptionalTensor token_type, OptionalTensor weight, OptionalTensor position_ids,
    OptionalTensor token_type_ids, OptionalTensor seed, double dropout_p, int64_t padding_idx,
    int64_t position_padding_idx, bool need_word, bool need_position, bool need_token_type,
    bool need_weight, bool need_bias) {
  constexpr const char* op = "embedding_norm_bwd";
  EmbeddingGradParams p;
  set_inputs(op, p, {input_ids, word, position, token_type, position_ids, token_type_ids});
  const int64_t C = p.channels;
  STD_TORCH_CHECK(grad_out.dim() == input_ids.dim() + 1 && grad_out.numel() == p.tokens * C &&
                      grad_out.size(grad_out.dim() - 1) == C &&
                      scalar_type(grad_out) == scalar_type(word),
                  op, ": grad_out must have a row of word's dtype for each token");
  const int32_t type = scalar_type(word), float32 = aoti_torch_dtype_float32();
  STD_TORCH_CHECK(scalar_type(statistics) == float32 && statistics.numel() == 2 * p.tokens &&
                      statistics.is_contiguous(),
                  op, ": statistics must be (2, tokens), contiguous float32");
  STD_TORCH_CHECK(padding_idx < word.size(0), op, ": padding_idx must be below ", word.size(0));
  STD_TORCH_CHECK(
      position_padding_idx < 0 || (position && position_padding_idx < position->size(0)), op,
      ": position_padding_idx must be a row of position");
  weight = parameter(op, "weight", weight, word);

  const bool needed[] = {need_word, need_position && position, need_token_type && token_type};
  Tensor tables[] = {nothing(type), nothing(type), nothing(type)};
  for (int i = 0; i < kEmbeddingTables; ++i) {
    if (!needed[i]) continue;
    tables[i] = empty({p.tables[i].count, C}, type);
    p.dtables[i] = mutable_data<void>(tables[i]);
  }
  p.padding[0] = padding_idx;
  p.padding[1] = position_padding_idx;
  Tensor dweight = need_weight ? empty({C}, float32) : nothing(float32);
  Tensor dbias = need_bias ? empty({C}, float32) : nothing(float32);
  p.weight = data(weight);
  p.weight_dtype = weight ? dtype(*weight) : p.dtype;
  p.grad_out = rows_view(grad_out);
  p.mean = mutable_data<float>(statistics);
  p.rstd = p.mean + p.tokens;
  p.dweight = need_weight ? mutable_data<float>(dweight) : nullptr;
  p.dbias = need_bias ? mutable_data<float>(dbias) : nullptr;
  p.dropout = dropout(dropout_p, seed);
  kernels().embedding_norm_bwd(p, torch_threads());
  return {tables[0], tables[1], tables[2], dweight, dbias};
}

}  // namespace
}  // namespace ft::bind

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CPU, m) {
  m.impl("embedding_norm_fwd", TORCH_BOX(&ft::bind::embedding_norm_fwd));
  m.impl("embedding_norm_bwd", TORCH_BOX(&ft::bind::embedding_norm_bwd));
}
