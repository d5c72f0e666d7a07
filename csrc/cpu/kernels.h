// The table that each instruction set's library exports: its only symbol is `ft_cpu_kernels`.
#pragma once
#include "../common/adamw.h"
#include "../common/attention.h"
#include "../common/decode.h"
#include "../common/embedding.h"
#include "../common/gated_mlp.h"
#include "../common/loss.h"
#include "../common/mlp.h"
#include "../common/norm.h"
#include "../common/packed.h"
#include "../common/parallel.h"
#include "../common/qkv_projection.h"
#include "../common/rotary.h"

namespace ft {

struct Kernels {
  const char* isa;
  void (*attention_fwd)(const AttentionParams&, const Parallel&);
  void (*attention_bwd)(const AttentionGradParams&, const Parallel&);
  void (*norm_fwd)(const NormParams&, const Parallel&);
  void (*norm_bwd)(const NormGradParams&, const Parallel&);
  void (*linear_act_fwd)(const LinearParams&, const Parallel&);
  void (*linear_act_bwd)(const LinearGradParams&, const Parallel&);
  void (*mlp_fwd)(const MlpParams&, const Parallel&);
  void (*mlp_bwd)(const MlpGradParams&, const Parallel&);
  void (*gated_mlp_fwd)(const GatedMlpParams&, const Parallel&);
  void (*gated_mlp_bwd)(const GatedMlpGradParams&, const Parallel&);
  void (*qkv_projection_fwd)(const QkvProjectionParams&, const Parallel&);
  void (*qkv_projection_bwd)(const QkvProjectionGradParams&, const Parallel&);
  void (*attention_decode)(const DecodeParams&, const Parallel&);
  int64_t (*packed_bytes)(DType, int64_t n, int64_t k);
  void (*pack_weight)(DType, int64_t n, int64_t k, const RowsView& weight, void* to,
                      const Parallel&);
  void (*packed_linear)(const PackedLinearParams&, const Parallel&);
  void (*packed_mlp)(const PackedMlpParams&, const Parallel&);
  void (*adamw)(const AdamWParams&, const Parallel&);
  double (*sum_of_squares)(const SquaresParams&, const Parallel&);
  void (*cross_entropy_fwd)(const CrossEntropyParams&, const Parallel&);
  void (*cross_entropy_bwd)(const CrossEntropyGradParams&, const Parallel&);
  void (*linear_cross_entropy_fwd)(const LinearCrossEntropyParams&, const Parallel&);
  void (*linear_cross_entropy_bwd)(const LinearCrossEntropyGradParams&, const Parallel&);
  void (*rotary)(const RotaryParams&, const Parallel&);
  void (*embedding_norm_fwd)(const EmbeddingParams&, const Parallel&);
  void (*embedding_norm_bwd)(const EmbeddingGradParams&, const Parallel&);

  // Of one core, a second: see peak.cpp.
  double (*peak_flops)(DType);
  double (*read_bandwidth)(int64_t bytes);
  double (*copy_bandwidth)(int64_t bytes);
  double (*streaming_bandwidth)(int64_t bytes);
};

}  // namespace ft

extern "C" __attribute__((visibility("default"))) const ft::Kernels ft_cpu_kernels;
