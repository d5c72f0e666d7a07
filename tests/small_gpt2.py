"""A small GPT-2 of transformers with random weights, stock and accelerated."""

import copy
from collections import Counter

import torch
from small_models import B, T, transformers  # noqa: F401  B, T for the tests

import fast_transformer as ft
from fast_transformer.backends import record

LAYERS = 2
HEADS = ("LMHeadModel", "DoubleHeadsModel", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering")  # fmt: skip


def build(head="LMHeadModel", impl="sdpa", dropout=0.0, dtype=torch.float32, **options):
    """Weights large enough that no error drowns in them; in eval mode."""
    config = transformers.GPT2Config(
        **{
            "vocab_size": 60, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_inner": 48,
            "n_positions": 64, "initializer_range": 0.3, "attn_pdrop": dropout,
            "resid_pdrop": dropout, "embd_pdrop": dropout, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, **options,
        }
    )  # fmt: skip
    kind = getattr(transformers, f"GPT2{head}")
    return kind._from_config(config, attn_implementation=impl).to(dtype).eval()


def pair(*args, **options):
    """(stock, accelerated) models with the same weights."""
    stock = build(*args, **options)
    return stock, ft.accelerate(copy.deepcopy(stock))


def counted(call, *args, **kwargs):
    """What a call returns, how often each op ran in it, and on which backends."""
    with record() as calls:
        out = call(*args, **kwargs)
    return out, Counter(c.op for c in calls), {c.backend for c in calls}
