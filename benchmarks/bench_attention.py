"""attention and attention_varlen against SDPA, the plain formula and flex_attention.

Packed batches run against padded ones: PyTorch has nothing else that a mask goes with.
"""

from dataclasses import replace

from fast_transformer.benchmarks import attention_masks as masks
from fast_transformer.benchmarks import attention_peers as peers
from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import attention, attention_varlen
from fast_transformer.testing import AttentionCase, cases

SUITE = "attention"
CASES = cases("attention", "bench")
LONG = cases("attention", "long")
PEERS = {"sdpa": peers.sdpa, "formula": peers.plain}
JUDGED_PAIRS = 1 << 22  # of query and key: about a second of float64, forward and backward


def contest(case: AttentionCase, dtype: str) -> Contest:
    """Ours and PyTorch's ways, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype]) | {"return_lse": False}
    ours = attention_varlen if case.padding == "varlen" else attention
    ways = {name: make(case, inputs) for name, make in PEERS.items()}
    work = case.shape[-1] * masks.pairs(case, inputs)
    # two products forward, five backward, of 2·D each for every pair of query and key
    return Contest(
        case, dtype, Entry(ours, inputs, case.wrt), ways, "formula",
        flops=(4 * work, 10 * work), judged=judged(case),
        only_compiled=lambda: {"flex": peers.flex(case, inputs)},
    )  # fmt: skip


def judged(case: AttentionCase) -> AttentionCase:
    """The case on as many heads, then rows, as float64 can follow; keys and sequences stay all."""
    B, H, T, S, *rest = case.shape
    H = max(1, min(H, JUDGED_PAIRS // (B * T * S)))
    T = max(1, min(T, JUDGED_PAIRS // (B * H * S)))
    return replace(case, shape=(B, H, T, S, *rest))
