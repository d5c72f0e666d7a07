// The one symbol of this instruction set's library.
#include "kernels.h"

#define FT_STRING_(x) #x
#define FT_STRING(x) FT_STRING_(x)

namespace ft::FT_ISA {
void attention_fwd(const AttentionParams&, const Parallel&);
void attention_bwd(const AttentionGradParams&, const Parallel&);
void norm_fwd(const NormParams&, const Parallel&);
void norm_bwd(const NormGradParams&, const Parallel&);
void linear_act_fwd(const LinearParams&, const Parallel&);
void linear_act_bwd(const LinearGradParams&, const Parallel&);
void mlp_fwd(const MlpParams&, const Parallel&);
void mlp_bwd(const MlpGradParams&, const Parallel&);
void attention_decode(const DecodeParams&, const Parallel&);
void rotary(const RotaryParams&, const Parallel&);
void embedding_norm_fwd(const EmbeddingParams&, const Parallel&);
void embedding_norm_bwd(const EmbeddingGradParams&, const Parallel&);
double peak_flops(DType);
double read_bandwidth(int64_t bytes);
double copy_bandwidth(int64_t bytes);
double streaming_bandwidth(int64_t bytes);
}  // namespace ft::FT_ISA

namespace isa = ft::FT_ISA;

const ft::Kernels ft_cpu_kernels = {
    FT_STRING(FT_ISA),
    isa::attention_fwd,
    isa::attention_bwd,
    isa::norm_fwd,
    isa::norm_bwd,
    isa::linear_act_fwd,
    isa::linear_act_bwd,
    isa::mlp_fwd,
    isa::mlp_bwd,
    isa::attention_decode,
    isa::rotary,
    isa::embedding_norm_fwd,
    isa::embedding_norm_bwd,
    isa::peak_flops,
    isa::read_bandwidth,
    isa::copy_bandwidth,
    isa::streaming_bandwidth,
};
