"""What every op means, in plain PyTorch: differentiable, on any device, at any dtype.

Matrix products run at the inputs' dtype; softmax, statistics and dropout at float32 or wider.
These functions check nothing: `fast_transformer.ops` does, before it calls them.
"""

from fast_transformer.reference.attention import attention, attention_varlen
from fast_transformer.reference.decode import attention_decode
from fast_transformer.reference.embedding import embedding_norm
from fast_transformer.reference.mlp import linear_act, mlp
from fast_transformer.reference.norm import add_norm, layer_norm
from fast_transformer.reference.relative import relative_attention
from fast_transformer.reference.rotary import rotary

__all__ = [
    "add_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "embedding_norm",
    "layer_norm",
    "linear_act",
    "mlp",
    "relative_attention",
    "rotary",
]
