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
int64_t packed_bytes(DType, int64_t n, int64_t k);
void pack_weight(DType, int64_t n, int64_t k, const RowsView& weight, void* to, const Parallel&);
void packed_linear(const PackedLinearParams&, const Parallel&);
void packed_mlp(const PackedMlpParams&, const Parallel&);
void cross_entropy_fwd(const CrossEntropyParams&, const Parallel&);
void cross_entropy_bwd(const CrossEntropyGradParams&, const Parallel&);
void linear_cross_entropy_fwd(const LinearCrossEntropyParams&, const Parallel&);
void linear_cross_entropy_bwd(const LinearCrossEntropyGradParams&, const Parallel&);
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
    isa::packed_bytes,
    isa::pack_weight,
    isa::packed_linear,
    isa::packed_mlp,
    isa::cross_entropy_fwd,
    isa::cross_entropy_bwd,
    isa::linear_cross_entropy_fwd,
    isa::linear_cross_entropy_bwd,
    isa::peak_flops,
    isa::read_bandwidth,
    isa::copy_bandwidth,
    isa::streaming_bandwidth,
};
