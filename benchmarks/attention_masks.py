"""Which keys a row sees and what is added to its scores, said once for every peer.

Both are functions of the place (b, h, i, j): batch, head, row and column, as index tensors. Dense
masks come of broadcasting them, flex_attention takes them as they are. An option of attention that
changes either is a function more here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fast_transformer.testing import AttentionCase

Inputs = Mapping[str, Any]
Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (b, h, i, j) -> bool
Scored = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # (score, b, h, i, j) -> score


def lengths(inputs: Inputs, side: str) -> Tensor:
    """Tokens of every sequence of a packed batch; side is "q" or "k"."""
    return inputs[f"cu_seqlens_{side}"].diff()


def lengths_of_batch(case: AttentionCase, inputs: Inputs) -> tuple[int, int, int, int]:
    """(batch, heads, T, S), the longest of a packed batch."""
    B, H, T, S = case.shape[:4]
    if case.padding == "varlen":
        T, S = (int(lengths(inputs, side).max()) for side in "qk")
    return B, H, T, S


def distance(case: AttentionCase, inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How far key j of sequence b lies ahead of the diagonal of row i, a function of (b, i, j)."""
    _, _, T, S = case.shape[:4]
    if case.padding == "varlen" and case.causal_offset is None:
        offsets = lengths(inputs, "k") - lengths(inputs, "q")
        return lambda b, i, j: j - i - offsets[b]
    offset = S - T if case.causal_offset is None else case.causal_offset
    return lambda b, i, j: j - i - offset


def structure(case: AttentionCase, inputs: Inputs) -> list[Seen]:
    """What follows from lengths and order, so that a kernel need not compute what it hides."""
    seen: list[Seen] = []
    if case.padding == "right":
        ends = inputs["key_lengths"]
        seen.append(lambda b, h, i, j: j < ends[b])
    elif case.padding == "left":
        starts = inputs["key_starts"]
        seen.append(lambda b, h, i, j: j >= starts[b])
    elif case.padding == "varlen":
        keys = lengths(inputs, "k")
        seen.append(lambda b, h, i, j: j < keys[b])
    ahead = distance(case, inputs)
    left, right = case.window
    if case.causal:
        seen.append(lambda b, h, i, j: ahead(b, i, j) <= 0)
    if left >= 0:
        seen.append(lambda b, h, i, j: ahead(b, i, j) >= -left)
    if right >= 0:
        seen.append(lambda b, h, i, j: ahead(b, i, j) <= right)
    return seen


def hidden(case: AttentionCase, inputs: Inputs) -> list[Seen]:
    """What only the values of a boolean mask tell: it saves nobody a product."""
    if case.bias not in ("bool", "padding"):
        return []
    mask = inputs["bias"]
    if case.bias == "padding":
        return [lambda b, h, i, j: mask[b, 0, 0, j]]
    return [lambda b, h, i, j: mask[i, j]]


def added(case: AttentionCase, inputs: Inputs) -> list[Scored]:
    """What is added to the scores, in order."""
    terms: list[Scored] = []
    if case.alibi:
        slopes, ahead = inputs["alibi_slopes"], distance(case, inputs)
        terms.append(lambda score, b, h, i, j: score - slopes[h] * ahead(b, i, j).abs())
    if case.bias == "additive":
        bias = inputs["bias"]
        terms.append(lambda score, b, h, i, j: score + bias[h, i, j])
    return terms


def scores(case: AttentionCase, inputs: Inputs) -> list[Scored]:
    """What is done to the scaled scores, in order."""
    if case.softcap == 0:
        return added(case, inputs)
    cap = case.softcap
    return [lambda score, b, h, i, j: (score / cap).tanh() * cap, *added(case, inputs)]


def places(case: AttentionCase, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All (b, h, i, j), each index along its own dimension of four."""
    b, h, i, j = (torch.arange(n) for n in lengths_of_batch(case, inputs))
    return b[:, None, None, None], h[:, None, None], i[:, None], j


def visibility(case: AttentionCase, inputs: Inputs, seen: list[Seen]) -> Tensor | None:
    """Whether a row sees a key, in four dimensions of full length or 1; None where all see all."""
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for each in seen:
        visible = visible & each(*places(case, inputs))
    return visible if seen else None


def pairs(case: AttentionCase, inputs: Inputs) -> float:
    """Pairs of query and key that must be multiplied."""
    B, H, T, S = lengths_of_batch(case, inputs)
    visible = visibility(case, inputs, structure(case, inputs))
    if visible is None:
        return float(B * H * T * S)
    if case.padding == "varlen":
        b, _, i, _ = places(case, inputs)
        visible = visible & (i < lengths(inputs, "q")[b])
    return float(visible.expand(B, H, T, S).sum().item())
