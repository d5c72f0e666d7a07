"""PyTorch's ways to compute attention: SDPA, the formula, flex_attention.

Each is made for a case as an Entry, or answers with the reason why it cannot compute that case.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_transformer.benchmarks import attention_masks as masks
from fast_transformer.benchmarks.contest import Entry
from fast_transformer.benchmarks.memory import available_memory
from fast_transformer.testing import AttentionCase

Inputs = Mapping[str, Any]
TENSORS = ("query", "key", "value")


def dense(case: AttentionCase, inputs: Inputs) -> dict[str, Any]:
    """Query, key and value, each (batch, heads, length, head_dim), and whether heads share keys."""
    packed = case.padding == "varlen"
    tensors = {name: pad(inputs, name) if packed else inputs[name] for name in TENSORS}
    return tensors | ({"enable_gqa": True} if case.kv_heads else {})


def pad(inputs: Inputs, name: str) -> Tensor:
    """(tokens, heads, head_dim) to (batch, heads, longest, head_dim)."""
    rows = inputs[name].split(masks.lengths(inputs, "q" if name == "query" else "k").tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).contiguous()


def mask_of(case: AttentionCase, inputs: Inputs) -> Tensor | None:
    """One tensor that says it all, as PyTorch takes it: boolean, or added to the scores.

    All but a bias that has a gradient: what is made of that is made in every call.
    """
    seen = masks.structure(case, inputs) + masks.hidden(case, inputs)
    visible = masks.visibility(case, inputs, seen)
    added = masks.added(replace(case, bias=None) if case.bias_gradient else case, inputs)
    if not added:
        return visible
    total = torch.zeros((), dtype=torch.float32)
    for each in added:
        total = each(total, *masks.places(case, inputs))
    total = total.to(inputs["query"].dtype)
    return total if visible is None else total.masked_fill(~visible, -torch.inf)


def joined(mask: Tensor | None, bias: Tensor) -> Tensor:
    """One mask of a bias that has a gradient and of what else there is."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def sdpa(case: AttentionCase, inputs: Inputs) -> Entry | str:
    """F.scaled_dot_product_attention, told is_causal where that is the mask."""
    if case.softcap > 0:
        return "SDPA has no softcap"
    options = dense(case, inputs) | {"dropout_p": case.dropout_p}
    if case.bias_gradient:
        options |= {"mask": mask_of(case, inputs), "bias": inputs["bias"]}
        return Entry(sdpa_with_bias, options, case.wrt)
    # is_causal is top-left, and lets SDPA skip what lies above the diagonal
    square = case.shape[2] == case.shape[3] and case.window == (-1, -1)
    told = case.causal and square and not (case.padding or case.bias or case.alibi)
    options |= {"is_causal": True} if told else {"attn_mask": mask_of(case, inputs)}
    return Entry(F.scaled_dot_product_attention, options, case.wrt)


def sdpa_with_bias(query, key, value, mask, bias, **options):
    """SDPA, for which the mask is made of `bias`, so that the gradient goes there."""
    options["attn_mask"] = joined(mask, bias)
    return F.scaled_dot_product_attention(query, key, value, **options)


def plain(case: AttentionCase, inputs: Inputs) -> Entry | str:
    """The formula; it needs memory for all scores, several times over in training."""
    B, H, T, S = masks.lengths_of_batch(case, inputs)
    needed, free = 6 * B * H * T * S * inputs["query"].itemsize, available_memory()
    if needed > free:
        return f"its scores would take {needed >> 30} GB, and {free >> 30} are free"
    options = dense(case, inputs) | {"mask": mask_of(case, inputs), "dropout_p": case.dropout_p}
    options |= {"softcap": case.softcap, "bias": inputs["bias"] if case.bias_gradient else None}
    return Entry(formula, options, case.wrt)


def formula(query, key, value, mask=None, bias=None, dropout_p=0.0, softcap=0.0, enable_gqa=False):
    """What one writes without SDPA."""
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap > 0:
        scores = (scores / softcap).tanh() * softcap
    mask = mask if bias is None else joined(mask, bias)
    if mask is not None:
        masked = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else None
        scores = scores + mask if masked is None else masked
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def flex(case: AttentionCase, inputs: Inputs) -> Entry | str:
    """flex_attention, compiled for this case alone."""
    from torch.nn.attention import flex_attention as module

    if case.dropout_p > 0:
        return "flex_attention has no dropout"
    options = dense(case, inputs)
    if seen := masks.structure(case, inputs) + masks.hidden(case, inputs):
        B, _, T, S = masks.lengths_of_batch(case, inputs)
        options["block_mask"] = module.create_block_mask(
            module.and_masks(*seen), B, None, T, S, device="cpu"
        )
    if changed := masks.scores(case, inputs):

        def score(x, b, h, i, j):
            for each in changed:
                x = each(x, b, h, i, j)
            return x

        options["score_mod"] = score
    compiled = torch.compile(module.flex_attention, dynamic=False)
    return Entry(compiled, options, TENSORS)
