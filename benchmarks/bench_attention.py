"""attention and attention_varlen against SDPA, the plain formula and flex_attention.

Packed batches run against padded ones: PyTorch has nothing else that a mask goes with.
"""

from dataclasses import replace
from typing import TypeVar

from fast_transformer.benchmarks import attention_masks as masks
from fast_transformer.benchmarks import attention_peers as peers
from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import attention, attention_varlen
from fast_transformer.testing import AttentionCase, RelativeCase, cases

SUITE = "attention"
CASES = cases("attention", "bench")
LONG = cases("attention", "long")
PEERS = {"sdpa": peers.sdpa, "formula": peers.plain}
JUDGED_PAIRS = 1 << 22  # of query and key: about a second of float64, forward and backward
C = TypeVar("C", AttentionCase, RelativeCase)


def contest(case: AttentionCase, dtype: str) -> Contest:
    """Ours and PyTorch's ways, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype]) | {"return_lse": False}
    ours = attention_varlen if case.padding == "varlen" else attention
    ways = {name: make(case, inputs) for name, make in PEERS.items()}
    pairs = masks.pairs(case, inputs)
    D, value_dim = case.shape[-1], case.value_dim or case.shape[-1]
    # two products forward, five backward, of 2 operations each for every pair of query and key
    flops = (2 * (D + value_dim) * pairs, 2 * (3 * D + 2 * value_dim) * pairs)
    return Contest(
        case, dtype, Entry(ours, inputs, case.wrt), ways, "formula", flops=flops,
        judged=judged(case), only_compiled=lambda: {"flex": peers.flex(case, inputs)},
    )  # fmt: skip


def judged(case: C) -> C:
    """The case on as many heads, then rows, as float64 can follow; keys and sequences stay all.

    Heads go by whole groups that share a key, so that they share it as they do in the case.
    """
    B, H, T, S, *rest = case.shape
    group = H // (case.kv_heads or H)
    groups = max(1, min(H // group, JUDGED_PAIRS // (B * T * S * group)))
    T = max(1, min(T, JUDGED_PAIRS // (B * groups * group * S)))
    kv_heads = groups if case.kv_heads else None
    return replace(case, shape=(B, groups * group, T, S, *rest), kv_heads=kv_heads)
