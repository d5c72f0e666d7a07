"""Drop-in modules: the arguments, parameters and results of their torch.nn namesakes.

Each is a subclass of its namesake, so `isinstance` holds and state_dicts go both ways. They are not
meant for TorchScript, which torch has deprecated.
"""

from fast_transformer.nn.attention import MultiheadAttention
from fast_transformer.nn.encoder import TransformerEncoder
from fast_transformer.nn.encoder_layer import TransformerEncoderLayer
from fast_transformer.nn.gated_mlp import GatedMLP
from fast_transformer.nn.loss import CrossEntropyLoss, LinearCrossEntropy
from fast_transformer.nn.mlp import MLP
from fast_transformer.nn.norm import LayerNorm, RMSNorm
from fast_transformer.nn.rotary import RotaryEmbedding

__all__ = [
    "MLP",
    "CrossEntropyLoss",
    "GatedMLP",
    "LayerNorm",
    "LinearCrossEntropy",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
