"""Fused Transformer kernels for PyTorch: functions, modules, and a switch for existing models."""

from typing import Any

from fast_transformer.backends import backend, strict
from fast_transformer.env import __version__, env
from fast_transformer.ops import (
    add_norm,
    attention,
    attention_decode,
    attention_varlen,
    embedding_norm,
    layer_norm,
    linear_act,
    merge_attention,
    mlp,
    relative_attention,
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
    "embedding_norm",
    "env",
    "explain",
    "layer_norm",
    "linear_act",
    "merge_attention",
    "mlp",
    "nn",
    "relative_attention",
    "restore",
    "rotary",
    "strict",
    "t5_buckets",
]

_LAZY = ("accelerate", "explain", "restore")  # their module knows of transformers, when it is there


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "nn":
        return import_module("fast_transformer.nn")
    if name in _LAZY:
        return getattr(import_module("fast_transformer.integrations"), name)
    raise AttributeError(f"module 'fast_transformer' has no attribute {name!r}")
