"""What every op means, in plain PyTorch: differentiable, on any device, at any dtype.

Matrix products run at the inputs' dtype; softmax, statistics and dropout at float32 or wider.
These functions check nothing: `fast_transformer.ops` does, before it calls them.
"""

from fast_transformer.reference.adamw import adamw_, clip_coefficient, grad_norm
from fast_transformer.reference.attention import attention, attention_varlen
from fast_transformer.reference.decode import attention_decode
from fast_transformer.reference.embedding import embedding_norm
from fast_transformer.reference.gated_mlp import gated_mlp
from fast_transformer.reference.loss import cross_entropy, linear_cross_entropy
from fast_transformer.reference.mlp import linear_act, mlp
from fast_transformer.reference.norm import add_norm, layer_norm, rms_norm
from fast_transformer.reference.qkv_projection import qkv_projection
from fast_transformer.reference.relative import relative_attention
from fast_transformer.reference.rotary import rotary

__all__ = [
    "adamw_",
    "add_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "clip_coefficient",
    "grad_norm",
    "cross_entropy",
    "embedding_norm",
    "gated_mlp",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "mlp",
    "qkv_projection",
    "relative_attention",
    "rms_norm",
    "rotary",
]
