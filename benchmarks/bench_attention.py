"""attention and attention_varlen against SDPA and the plain formula, and packed against padded."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer import attention, attention_varlen
from fast_transformer.testing import AttentionCase, cases

SUITE = "attention"
CASES = cases("attention", "bench")


def contest(case: AttentionCase, dtype: str) -> Contest:
    """Ours, SDPA with the mask that says the same, and softmax(QKᵀ)V in plain PyTorch."""
    inputs = case.inputs(DTYPES[dtype]) | {"return_lse": False}
    packed = case.padding == "varlen"
    ours = Entry(attention_varlen if packed else attention, inputs, case.wrt)
    visible = visibility(case, inputs)
    names = ("query", "key", "value")
    dense = {name: pad(inputs, name) if packed else inputs[name] for name in names}
    dense["dropout_p"] = case.dropout_p
    dense |= {"enable_gqa": True} if case.kv_heads else {}
    # is_causal is top-left, and lets SDPA skip what lies above the diagonal
    plain_causal = case.causal and case.shape[2] == case.shape[3] and case.window == (-1, -1)
    told = plain_causal and not (case.padding or case.bias or case.alibi)
    if case.bias_gradient:  # the mask has to be made of it in every call
        dense |= {"bias": inputs["bias"], "hidden": None if visible.all() else ~visible}
        options: dict = {}
        told = False
    else:
        dense["attn_mask"] = mask(case, inputs, visible)
        options = {"is_causal": True, "attn_mask": None} if told else {}
    peers = {"sdpa": Entry(sdpa, dense | options, case.wrt)} if case.softcap == 0 else {}
    peers["formula"] = Entry(formula, dense | {"softcap": case.softcap}, case.wrt)
    pairs = seen(case, inputs, visible)
    D, value_dim = case.shape[-1], case.value_dim or case.shape[-1]
    # two products forward, five backward, of 2 operations each for every pair of query and key
    flops = (2 * (D + value_dim) * pairs, 2 * (3 * D + 2 * value_dim) * pairs)
    return Contest(case, dtype, ours, peers, flops=flops)


def sdpa(query, key, value, bias=None, hidden=None, **options):
    """PyTorch's, with a mask made of `bias` where that has a gradient."""
    if bias is not None:
        options["attn_mask"] = bias if hidden is None else bias.masked_fill(hidden, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, **options)


def formula(query, key, value, bias=None, hidden=None, attn_mask=None, dropout_p=0.0,
            softcap=0.0, enable_gqa=False):  # fmt: skip
    """What one writes without SDPA."""
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap > 0:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + bias
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def mask(case: AttentionCase, inputs: dict, visible: Tensor) -> Tensor | None:
    """What says the same to SDPA: a bool mask, one to add, or None where all is seen."""
    added = inputs["bias"] if case.bias == "additive" else None
    if case.alibi:
        distance = ahead(case, inputs).abs()
        slopes = -inputs["alibi_slopes"][:, None, None] * distance
        added = slopes.to(inputs["query"].dtype) + (0 if added is None else added)
    if added is not None:
        return added if visible.all() else added.masked_fill(~visible, -torch.inf)
    everything = case.bias is None and case.padding is None and case.window == (-1, -1)
    return None if everything and not case.causal else visible


def lengths(inputs: dict, side: str) -> Tensor:
    """Tokens of every sequence of a packed batch; side is "q" or "k"."""
    return inputs[f"cu_seqlens_{side}"].diff()


def pad(inputs: dict, name: str) -> Tensor:
    """(tokens, heads, head_dim) to (batch, heads, longest, head_dim), as PyTorch takes it."""
    rows = inputs[name].split(lengths(inputs, "q" if name == "query" else "k").tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).contiguous()


def sizes(case: AttentionCase, inputs: dict) -> tuple[int, int]:
    """T and S of the padded batch."""
    if case.padding == "varlen":
        return int(lengths(inputs, "q").max()), int(lengths(inputs, "k").max())
    return case.shape[2], case.shape[3]


def ahead(case: AttentionCase, inputs: dict) -> Tensor:
    """How far a key lies ahead of its row's diagonal, broadcastable to (batch, heads, T, S)."""
    T, S = sizes(case, inputs)
    offset: int | Tensor = S - T if case.causal_offset is None else case.causal_offset
    if case.padding == "varlen" and case.causal_offset is None:
        offset = (lengths(inputs, "k") - lengths(inputs, "q"))[:, None, None, None]
    return torch.arange(S) - torch.arange(T)[:, None] - offset


def visibility(case: AttentionCase, inputs: dict) -> Tensor:
    """Whether a row sees a key, broadcastable to (batch, heads, T, S)."""
    column = torch.arange(sizes(case, inputs)[1])
    visible = torch.ones(1, 1, 1, len(column), dtype=torch.bool)
    if case.padding == "right":
        visible = visible & (column < inputs["key_lengths"][:, None, None, None])
    elif case.padding == "left":
        visible = visible & (column >= inputs["key_starts"][:, None, None, None])
    elif case.padding == "varlen":
        visible = visible & (column < lengths(inputs, "k")[:, None, None, None])
    left, right = case.window
    if case.causal:
        visible = visible & (ahead(case, inputs) <= 0)
    if left >= 0:
        visible = visible & (ahead(case, inputs) >= -left)
    if right >= 0:
        visible = visible & (ahead(case, inputs) <= right)
    if case.bias in ("bool", "padding"):
        visible = visible & inputs["bias"]
    return visible


def seen(case: AttentionCase, inputs: dict, visible: Tensor) -> float:
    """Pairs of query and key that must be multiplied; a boolean bias spares none."""
    B, H, T, S, _ = case.shape
    if case.bias in ("bool", "padding"):
        return float(B * H * T * S)
    T, S = sizes(case, inputs)
    if case.padding == "varlen":
        real = torch.arange(T)[:, None] < lengths(inputs, "q")[:, None, None, None]
        visible = visible & real
    return H * visible.expand(B, 1, T, S).sum().item()
