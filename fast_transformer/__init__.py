"""Fused Transformer kernels for PyTorch: functions, modules, and a switch for existing models."""

from typing import Any

from fast_transformer.backends import backend, strict
from fast_transformer.env import __version__, env
from fast_transformer.ops import (
    add_norm,
    attention,
    attention_decode,
    attention_varlen,
    cross_entropy,
    embedding_norm,
    gated_mlp,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    merge_attention,
    mlp,
    qkv_projection,
    relative_attention,
    rms_norm,
    rotary,
    t5_buckets,
)

__all__ = [
    "__version__",
    "accelerate",
    "add_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backend",
    "cross_entropy",
    "embedding_norm",
    "env",
    "explain",
    "gated_mlp",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "merge_attention",
    "mlp",
    "nn",
    "optim",
    "qkv_projection",
    "relative_attention",
    "repack",
    "restore",
    "rms_norm",
    "rotary",
    "strict",
    "t5_buckets",
]

# their module knows of transformers, when it is there
_LAZY = ("accelerate", "explain", "repack", "restore")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("nn", "optim"):
        return import_module(f"fast_transformer.{name}")
    if name in _LAZY:
        return getattr(import_module("fast_transformer.integrations"), name)
    raise AttributeError(f"module 'fast_transformer' has no attribute {name!r}")
