"""PyTorch's ways to compute attention: SDPA, the formula, flex_attention.

Each is made for a case as an Entry, or answers with the reason why it cannot compute that case.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_transformer.benchmarks import attention_masks as masks
from fast_transformer.benchmarks.contest import Entry
from fast_transformer.benchmarks.memory import available_memory
from fast_transformer.testing import AttentionCase

Inputs = Mapping[str, Any]


def dense(case: AttentionCase, inputs: Inputs) -> dict[str, Tensor]:
    """Query, key and value as PyTorch takes them: (batch, heads, length, head_dim)."""
    if case.padding != "varlen":
        return {name: inputs[name] for name in case.wrt}
    return {name: pad(inputs, name) for name in case.wrt}


def pad(inputs: Inputs, name: str) -> Tensor:
    """(tokens, heads, head_dim) to (batch, heads, longest, head_dim)."""
    rows = inputs[name].split(masks.lengths(inputs, "q" if name == "query" else "k").tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).contiguous()


def mask_of(case: AttentionCase, inputs: Inputs) -> Tensor | None:
    """One tensor that says it all, as PyTorch takes it: boolean, or added to the scores."""
    seen = masks.structure(case, inputs) + masks.hidden(case, inputs)
    visible = masks.visibility(case, inputs, seen)
    added = masks.scores(case, inputs)
    if not added:
        return visible
    total = torch.zeros((), dtype=inputs["query"].dtype)
    for each in added:
        total = each(total, *masks.places(case, inputs))
    return total if visible is None else total.masked_fill(~visible, -torch.inf)


def sdpa(case: AttentionCase, inputs: Inputs) -> Entry | str:
    """F.scaled_dot_product_attention, told is_causal where that is the mask."""
    # is_causal is top-left, and lets SDPA skip what lies above the diagonal
    told = case.causal and not case.padding and not case.bias and case.shape[2] == case.shape[3]
    options = {"is_causal": True} if told else {"attn_mask": mask_of(case, inputs)}
    options["dropout_p"] = case.dropout_p
    return Entry(F.scaled_dot_product_attention, dense(case, inputs) | options, case.wrt)


def plain(case: AttentionCase, inputs: Inputs) -> Entry | str:
    """The formula; it needs memory for all scores, several times over in training."""
    B, H, T, S = masks.lengths_of_batch(case, inputs)
    needed, free = 6 * B * H * T * S * inputs["query"].itemsize, available_memory()
    if needed > free:
        return f"its scores would take {needed >> 30} GB, and {free >> 30} are free"
    options = {"mask": mask_of(case, inputs), "dropout_p": case.dropout_p}
    return Entry(formula, dense(case, inputs) | options, case.wrt)


def formula(query, key, value, mask=None, dropout_p=0.0):
    """What one writes without SDPA."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        masked = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else None
        scores = scores + mask if masked is None else masked
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def flex(case: AttentionCase, inputs: Inputs) -> Entry | str:
    """flex_attention, compiled for this case alone."""
    from torch.nn.attention import flex_attention as module

    if case.dropout_p > 0:
        return "flex_attention has no dropout"
    options: dict[str, Any] = {}
    if seen := masks.structure(case, inputs) + masks.hidden(case, inputs):
        B, _, T, S = masks.lengths_of_batch(case, inputs)
        options["block_mask"] = module.create_block_mask(
            module.and_masks(*seen), B, None, T, S, device="cpu"
        )
    if added := masks.scores(case, inputs):

        def score(x, b, h, i, j):
            for each in added:
                x = each(x, b, h, i, j)
            return x

        options["score_mod"] = score
    compiled = torch.compile(module.flex_attention, dynamic=False)
    return Entry(compiled, dense(case, inputs) | options, case.wrt)
