// The operators' schemas, and the instruction set that serves them. What a family does with its
// tensors is in <family>.cpp beside this file, registered there by STABLE_TORCH_LIBRARY_IMPL.
//
// An operator's arguments are checked in Python, where messages can name what the caller wrote.
#include <dlfcn.h>

#include <string>

#include "tensor.h"

namespace ft::bind {
namespace {

const Kernels* installed = nullptr;

std::string isa() { return installed ? installed->isa : "none"; }

// Opens one _cpu_<isa>.so. RTLD_LOCAL: the instruction sets share template names, and code compiled
// for one must never be taken for another's. Never closed, since threads keep scratch memory of it.
void load_kernels(std::string path) {
  STD_TORCH_CHECK(installed == nullptr, "load_kernels: ", isa(), " kernels are loaded already");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(library != nullptr, "load_kernels: ", dlerror());
  const void* table = dlsym(library, "ft_cpu_kernels");
  STD_TORCH_CHECK(table != nullptr, "load_kernels: ", dlerror());
  installed = static_cast<const Kernels*>(table);
}

}  // namespace

const Kernels& kernels() {
  STD_TORCH_CHECK(installed != nullptr, "fast_transformer: no CPU kernels are loaded");
  return *installed;
}

}  // namespace ft::bind

STABLE_TORCH_LIBRARY(fast_transformer, m) {
  // seed is given iff dropout_p > 0. What the rest means is in common/attention.h. What is not
  // needed has no elements.
  m.def(
      "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_starts, "
      "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, "
      "Tensor? alibi_slopes, Tensor? distance_bias, Tensor? position_query, Tensor? position_key, "
      "Tensor? segment_scores, Tensor? query_segments, Tensor? key_segments, float scale, "
      "bool causal, int? causal_offset, int window_left, int window_right, float softcap, "
      "int position_zero, float dropout_p, bool save_softmax) "
      "-> (Tensor out, Tensor lse, Tensor softmax)");
  m.def(
      "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor softmax, Tensor? bias, Tensor? key_starts, Tensor? key_lengths, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, Tensor? alibi_slopes, "
      "Tensor? distance_bias, Tensor? position_query, Tensor? position_key, "
      "Tensor? segment_scores, Tensor? query_segments, Tensor? key_segments, float scale, "
      "bool causal, int? causal_offset, int window_left, int window_right, float softcap, "
      "int position_zero, float dropout_p, bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, "
      "Tensor dbias, Tensor ddistance_bias, Tensor dposition_query, Tensor dposition_key, "
      "Tensor dsegment_scores)");

  // norm: the codes of ft::NormKind in common/norm.h. The first is for whoever wants no gradient:
  // it saves nothing. What is not needed has no elements.
  m.def(
      "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int norm, "
      "float eps, float dropout_p) -> Tensor");
  m.def(
      "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int norm, "
      "float eps, float dropout_p, bool save_sum) "
      "-> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "norm_bwd(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, "
      "Tensor? weight, Tensor? seed, int norm, float dropout_p, bool has_weight, bool has_bias) "
      "-> (Tensor dresidual, Tensor dx, Tensor dweight, Tensor dbias)");

  // activation: the codes of ft::Activation in common/mlp.h. What is not needed has no elements.
  m.def(
      "linear_act_fwd(Tensor x, Tensor weight, Tensor? bias, int activation, bool save_pre) "
      "-> (Tensor y, Tensor pre)");
  m.def(
      "linear_act_bwd(Tensor grad_out, Tensor x, Tensor weight, Tensor pre, int activation, "
      "bool need_dx, bool need_dw, bool need_db) -> (Tensor dx, Tensor dw, Tensor db)");
  m.def(
      "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? seed, "
      "int activation, float dropout_p, bool save_pre) -> (Tensor y, Tensor pre)");
  m.def(
      "mlp_bwd(Tensor grad_out, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? pre, "
      "Tensor? seed, int activation, float dropout_p, bool need_dx, bool need_dw1, bool need_db1, "
      "bool need_dw2, "
      "bool need_db2) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
  m.def(
      "gated_mlp_fwd(Tensor x, Tensor w_gate, Tensor? b_gate, Tensor w_up, Tensor? b_up, "
      "Tensor w_down, Tensor? b_down, int activation, bool save) "
      "-> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "gated_mlp_bwd(Tensor grad_out, Tensor x, Tensor w_gate, Tensor? b_gate, Tensor w_up, "
      "Tensor? b_up, Tensor w_down, Tensor? gate, Tensor? up, int activation, bool need_dx, "
      "bool need_dw_gate, bool need_db_gate, bool need_dw_up, bool need_db_up, "
      "bool need_dw_down, bool need_db_down) -> (Tensor dx, Tensor dw_gate, Tensor db_gate, "
      "Tensor dw_up, Tensor db_up, Tensor dw_down, Tensor db_down)");

  // The weights are query's, key's and value's, or all three in the first. The results are
  // (batch, heads, length, head_dim), of a matrix x (tokens, heads, head_dim); their gradients are
  // contiguous in the order of x's rows, (batch, length, heads, head_dim).
  m.def(
      "qkv_projection_fwd(Tensor x, Tensor weight, Tensor? key_weight, Tensor? value_weight, "
      "Tensor? bias, Tensor? key_bias, Tensor? value_bias, int heads, int kv_heads) "
      "-> (Tensor query, Tensor key, Tensor value)");
  m.def(
      "qkv_projection_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor x, Tensor weight, "
      "Tensor? key_weight, Tensor? value_weight, bool need_dx, bool need_dweight, "
      "bool need_dkey_weight, bool need_dvalue_weight, bool need_dbias, bool need_dkey_bias, "
      "bool need_dvalue_bias) -> (Tensor dx, Tensor dweight, Tensor dkey_weight, "
      "Tensor dvalue_weight, Tensor dbias, Tensor dkey_bias, Tensor dvalue_bias)");

  // Weights that modules prepare for inference: panels, or with a scale (out, in) of int8.
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int out_features, "
      "int activation) -> Tensor");
  m.def(
      "packed_mlp(Tensor x, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2, Tensor? scale2, "
      "Tensor? b2, int hidden_features, int out_features, int activation) -> Tensor");

  // loss: one float32 a row, or one. statistics: two for each row, see common/loss.h. reduction:
  // the codes of ft::Reduction.
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor target, int ignore_index, float label_smoothing, "
      "float z_loss, int reduction) -> (Tensor loss, Tensor statistics)");
  m.def(
      "cross_entropy_bwd(Tensor grad_loss, Tensor logits, Tensor target, Tensor statistics, "
      "int ignore_index, float label_smoothing, float z_loss, int reduction) -> Tensor dlogits");
  m.def(
      "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
      "int ignore_index, float label_smoothing, float z_loss, int reduction) "
      "-> (Tensor loss, Tensor statistics)");
  m.def(
      "linear_cross_entropy_bwd(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor? bias, "
      "Tensor target, Tensor statistics, int ignore_index, float label_smoothing, float z_loss, "
      "int reduction, bool need_dhidden, bool need_dweight, bool need_dbias) "
      "-> (Tensor dhidden, Tensor dweight, Tensor dbias)");

  // Writes new_key and new_value, where given, into the caches.
  m.def(
      "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor cache_lengths, Tensor? new_key, Tensor? new_value, Tensor? block_table, "
      "Tensor? alibi_slopes, float scale, bool causal, int window_left, int window_right, "
      "float softcap) -> (Tensor out, Tensor lse)");

  // Of every tensor a parameter, its gradient and its state; steps are 0-d and counted up.
  // max_exp_avg_sqs: as many, or none.
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, "
      "float beta1, float beta2, float weight_decay, float eps, float grad_scale) -> ()");
  m.def("sum_of_squares(Tensor[] tensors) -> Tensor");
  // inverse: by the negative angle. Without a key its result has no elements.
  m.def(
      "rotary(Tensor query, Tensor? key, Tensor cos, Tensor sin, bool interleaved, bool inverse) "
      "-> (Tensor out_query, Tensor out_key)");

  // Each token's rows of the tables, added up, normalised and dropped from; without position_ids
  // token t of a row has position t, without token_type_ids type 0. statistics: (2, tokens).
  m.def(
      "embedding_norm_fwd(Tensor input_ids, Tensor word, Tensor? position, Tensor? token_type, "
      "Tensor? weight, Tensor? bias, Tensor? position_ids, Tensor? token_type_ids, Tensor? seed, "
      "float eps, float dropout_p) -> (Tensor out, Tensor statistics)");
  m.def(
      "embedding_norm_bwd(Tensor grad_out, Tensor statistics, Tensor input_ids, Tensor word, "
      "Tensor? position, Tensor? token_type, Tensor? weight, Tensor? position_ids, "
      "Tensor? token_type_ids, Tensor? seed, float dropout_p, int padding_idx, "
      "int position_padding_idx, bool need_word, bool need_position, bool need_token_type, "
      "bool need_weight, bool need_bias) -> (Tensor dword, Tensor dposition, Tensor dtoken_type, "
      "Tensor dweight, Tensor dbias)");

  m.def("isa() -> str");
  m.def("load_kernels(str path) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fast_transformer, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&ft::bind::isa));
  m.impl("load_kernels", TORCH_BOX(&ft::bind::load_kernels));
}
