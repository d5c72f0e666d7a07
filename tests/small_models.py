"""Small models of transformers with random weights, and the masks that they are run with."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

transformers = pytest.importorskip("transformers")

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
B, T = 4, 13


def build(family="Bert", head="Model", impl="sdpa", dropout=0.0, dtype=torch.float32, **options):
    """A model of two layers in eval mode; weights large enough that no error drowns in them."""
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.3,
            "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
            **options,
        }
    )  # fmt: skip
    kind = getattr(transformers, f"{family}{head}")
    return kind._from_config(config, attn_implementation=impl).to(dtype).eval()


def ids(batch=B, length=T):
    return torch.randint(3, 60, (batch, length))


def _right():
    return (torch.arange(T) < torch.tensor([13, 7, 1, 10])[:, None]).long()


def _holes():
    mask = _right()
    mask[0, 2:5] = 0
    mask[3, 0] = 0
    return mask


def _empty_sample():
    mask = _right()
    mask[2] = 0
    return mask


MASKS = {
    "none": lambda: None,
    "full": lambda: torch.ones(B, T, dtype=torch.long),
    "right": _right,
    "left": lambda: _right().flip(1),
    "holes": _holes,
    "empty sample": _empty_sample,
    "bool": lambda: _right().bool(),
    "4-D padding": lambda: _right().bool()[:, None, None, :].expand(B, 1, T, T),
}


def real(mask):
    """(B, T) bool: where there is a token."""
    if mask is None:
        return torch.ones(B, T, dtype=torch.bool)
    return (mask if mask.dim() == 2 else mask[:, 0, 0]).bool()


def pair(*args, **options):
    """(stock, accelerated) models with the same weights."""
    import copy

    import fast_transformer as ft

    stock = build(*args, **options)
    return stock, ft.accelerate(copy.deepcopy(stock))
