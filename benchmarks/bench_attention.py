"""attention and attention_varlen against SDPA and the plain formula, and packed against padded."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer import attention, attention_varlen
from fast_transformer.testing import AttentionCase, cases

SUITE = "attention"
CASES = cases("attention", "bench")
NOT_PEERS = ("causal", "causal_offset", "key_starts", "key_lengths", "seed", "return_lse")


def contest(case: AttentionCase, dtype: str) -> Contest:
    """Ours, SDPA with the mask that says the same, and softmax(QKᵀ)V in plain PyTorch."""
    inputs = case.inputs(DTYPES[dtype]) | {"return_lse": False}
    packed = case.padding == "varlen"
    ours = Entry(attention_varlen if packed else attention, inputs, case.wrt)
    visible = visibility(case, inputs)
    dense = {name: pad(inputs, name) if packed else inputs[name] for name in case.wrt}
    mask: Tensor | None = visible
    if case.bias == "additive":
        mask = inputs["bias"].masked_fill(~visible, -torch.inf)
    elif case.bias is None and case.padding is None and not case.causal:
        mask = None
    # is_causal is top-left, and lets SDPA skip what lies above the diagonal
    told = case.causal and not case.padding and not case.bias and case.shape[2] == case.shape[3]
    dropout = {"dropout_p": case.dropout_p}
    options = {"is_causal": True} if told else {"attn_mask": mask}
    sdpa = Entry(F.scaled_dot_product_attention, dense | options | dropout, case.wrt)
    plain = Entry(formula, dense | {"mask": mask} | dropout, case.wrt)
    pairs = seen(case, inputs, visible)
    D = case.shape[-1]
    # two products forward, five backward, of 2·D each for every pair of query and key
    return Contest(
        case, dtype, ours, {"sdpa": sdpa, "formula": plain}, flops=(4 * D * pairs, 10 * D * pairs)
    )


def formula(query, key, value, mask=None, dropout_p=0.0):
    """What one writes without SDPA."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        masked = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else None
        scores = scores + mask if masked is None else masked
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def lengths(inputs: dict, side: str) -> Tensor:
    """Tokens of every sequence of a packed batch; side is "q" or "k"."""
    return inputs[f"cu_seqlens_{side}"].diff()


def pad(inputs: dict, name: str) -> Tensor:
    """(tokens, heads, head_dim) to (batch, heads, longest, head_dim), as PyTorch takes it."""
    rows = inputs[name].split(lengths(inputs, "q" if name == "query" else "k").tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).contiguous()


def visibility(case: AttentionCase, inputs: dict) -> Tensor:
    """Whether a row sees a key, broadcastable to (batch, heads, T, S)."""
    B, _, T, S, _ = case.shape
    if case.padding == "varlen":
        T, S = (int(lengths(inputs, side).max()) for side in "qk")
    row, column = torch.arange(T)[:, None], torch.arange(S)
    visible = torch.ones(1, 1, 1, S, dtype=torch.bool)
    if case.padding == "right":
        visible = visible & (column < inputs["key_lengths"][:, None, None, None])
    elif case.padding == "left":
        visible = visible & (column >= inputs["key_starts"][:, None, None, None])
    elif case.padding == "varlen":
        visible = visible & (column < lengths(inputs, "k")[:, None, None, None])
    if case.causal and case.padding == "varlen":
        offset = (lengths(inputs, "k") - lengths(inputs, "q"))[:, None, None, None]
        visible = visible & (column <= row + offset)
    elif case.causal:
        offset = S - T if case.causal_offset is None else case.causal_offset
        visible = visible & (column <= row + offset)
    if case.bias in ("bool", "padding"):
        visible = visible & inputs["bias"]
    return visible


def seen(case: AttentionCase, inputs: dict, visible: Tensor) -> float:
    """Pairs of query and key that must be multiplied; a boolean bias spares none."""
    B, H, T, S, _ = case.shape
    if case.bias in ("bool", "padding"):
        return float(B * H * T * S)
    if case.padding == "varlen":
        T, S = (int(lengths(inputs, side).max()) for side in "qk")
        real = torch.arange(T)[:, None] < lengths(inputs, "q")[:, None, None, None]
        visible = visible & real
    return H * visible.expand(B, 1, T, S).sum().item()
