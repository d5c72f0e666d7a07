"""relative_attention against the papers' shift of a (T × L) product, and SDPA with it as a mask."""

import torch
from torch.nn import functional as F

from fast_transformer.benchmarks.bench_attention import judged
from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import relative_attention
from fast_transformer.testing import RelativeCase, cases

SUITE = "relative"
CASES = cases("relative", "bench")


def contest(case: RelativeCase, dtype: str) -> Contest:
    """Ours, and plain PyTorch with softmax written out or left to SDPA."""
    inputs = case.inputs(DTYPES[dtype]) | {"return_lse": False}
    ours = Entry(relative_attention, inputs, case.wrt)
    plain = {name: x for name, x in inputs.items() if name != "return_lse"}
    peers = {name: Entry(peer, plain, case.wrt) for name, peer in PEERS.items()}
    B, H, T, S, D = case.shape
    pairs = B * H * (sum(min(S, i + S - T + 1) for i in range(T)) if case.causal else T * S)
    # the product with position_key is one more forward; backward, it and its two gradients
    more = 1 if case.positions else 0
    flops = ((4 + 2 * more) * D * pairs, (10 + 6 * more) * D * pairs)
    return Contest(case, dtype, ours, peers, "formula", flops=flops, judged=judged(case))


def added(query, key, position_key=None, position_zero=None, position_bias=None, segment_key=None,
          segment_bias=None, query_segments=None, key_segments=None, distance_bias=None,
          causal=False):  # fmt: skip
    """The terms of the score beside content, (batch, heads, T, S), as a mask for SDPA."""
    B, H, T, D = query.shape
    S = key.shape[2]
    position_zero = T if position_zero is None else position_zero
    total = query.new_zeros(B, H, T, S)
    if position_key is not None:
        total = total + shift((query + position_bias[:, None]) @ position_key.permute(1, 2, 0),
                              position_zero, S)  # fmt: skip
    if segment_key is not None:
        both = (query + segment_bias[:, None]) @ segment_key.permute(1, 2, 0)
        same = query_segments[:, None, :, None] == key_segments[:, None, None]
        total = total + torch.where(same, both[..., :1], both[..., 1:])
    total = total * D**-0.5
    if distance_bias is not None:
        rows = distance_bias.to(query.dtype)[:, None].expand(-1, T, -1)
        total = total + shift(rows[None], position_zero, S)
    if causal:
        hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        total = total.masked_fill(hidden, -torch.inf)
    return total


def shift(x, position_zero, S):
    """x[..., i, p] to x[..., i, position_zero + j − i], by the papers' change of view.

    position_zero is T or T − 1. Where a p does not exist lies something of a row nearby; such pairs
    are hidden.
    """
    *batch, T, L = x.shape
    x = F.pad(x, (0, 1)) if L == S else x
    width = x.shape[-1] - 1
    rows = x.flatten(-2)[..., position_zero:]
    return rows[..., : T * width].view(*batch, T, width)[..., :S]


def formula(query, key, value, content_bias=None, **terms):
    """Softmax written out."""
    mask = added(query, key, **terms)
    query = query if content_bias is None else query + content_bias[:, None]
    return (query @ key.mT * query.shape[-1] ** -0.5 + mask).softmax(-1) @ value


def sdpa(query, key, value, content_bias=None, **terms):
    """SDPA, which differentiates such a mask on its slow path."""
    mask = added(query, key, **terms)
    query = query if content_bias is None else query + content_bias[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


PEERS = {"sdpa": sdpa, "formula": formula}
