// The one symbol of this instruction set's library.
#include "kernels.h"

#include <type_traits>

#define FT_STRING_(x) #x
#define FT_STRING(x) FT_STRING_(x)

// All kernels, in the order of kernels.h, whose types they have.
// clang-format off
#define FT_KERNELS(X) \
  X(attention_fwd) \
  X(attention_bwd) \
  X(norm_fwd) \
  X(norm_bwd) \
  X(linear_act_fwd) \
  X(linear_act_bwd) \
  X(mlp_fwd) \
  X(mlp_bwd) \
  X(gated_mlp_fwd) \
  X(gated_mlp_bwd) \
  X(qkv_projection_fwd) \
  X(qkv_projection_bwd) \
  X(attention_decode) \
  X(packed_bytes) \
  X(pack_weight) \
  X(packed_linear) \
  X(packed_mlp) \
  X(adamw) \
  X(sum_of_squares) \
  X(cross_entropy_fwd) \
  X(cross_entropy_bwd) \
  X(linear_cross_entropy_fwd) \
  X(linear_cross_entropy_bwd) \
  X(rotary) \
  X(embedding_norm_fwd) \
  X(embedding_norm_bwd) \
  X(peak_flops) \
  X(read_bandwidth) \
  X(copy_bandwidth) \
  X(streaming_bandwidth)
// clang-format on

namespace ft::FT_ISA {
#define FT_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
FT_KERNELS(FT_DECLARE)
}  // namespace ft::FT_ISA

#define FT_ENTRY(name) .name = ft::FT_ISA::name,
const ft::Kernels ft_cpu_kernels = {.isa = FT_STRING(FT_ISA), FT_KERNELS(FT_ENTRY)};
