"""The public functions: check the arguments, choose a backend, differentiate.

A family's file holds its functions, its table of backends, its autograd.Function and the fakes of
its C++ operators, in this order of a call's travel.
"""

from fast_transformer.ops.attention import attention, attention_varlen
from fast_transformer.ops.decode import attention_decode
from fast_transformer.ops.embedding import embedding_norm
from fast_transformer.ops.gated_mlp import gated_mlp
from fast_transformer.ops.loss import cross_entropy, linear_cross_entropy
from fast_transformer.ops.merge import merge_attention
from fast_transformer.ops.mlp import linear_act, mlp
from fast_transformer.ops.norm import add_norm, layer_norm, rms_norm
from fast_transformer.ops.qkv_projection import qkv_projection
from fast_transformer.ops.relative import relative_attention, t5_buckets
from fast_transformer.ops.rotary import rotary

__all__ = [
    "add_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "cross_entropy",
    "embedding_norm",
    "gated_mlp",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "merge_attention",
    "mlp",
    "qkv_projection",
    "relative_attention",
    "rms_norm",
    "rotary",
    "t5_buckets",
]
