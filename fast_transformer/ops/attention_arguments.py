"""What attention's public functions ask of their arguments.

A check of an option at its default costs nothing but a comparison: small calls are all overhead.
"""

import math

import torch
from torch import Tensor

from fast_transformer.ops import arguments

UNBOUNDED = (-1, -1)
FARTHEST = 2**31  # of causal_offset, window and position_zero: positions are 32-bit numbers


def autocast(query, key, value, bias):
    """Cast floating inputs as torch.autocast asks, but leave a float32 bias its precision."""
    dtype = arguments.autocast_dtype(query)
    if dtype is None:
        return query, key, value, bias
    query, key, value = (arguments.lower(x, dtype) for x in (query, key, value))
    if bias is not None and bias.dtype != torch.float32:
        bias = arguments.lower(bias, dtype)
    return query, key, value, bias


def inputs(op, query, key, value, layout):
    """The three inputs agree with each other; `layout` names their dimensions."""
    arguments.floating(op, "query", query)
    arguments.like(op, "key", key, "query", query)
    arguments.like(op, "value", value, "query", query)
    rank = 3 if op == "attention_varlen" else 4
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != rank:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must be {layout}.")
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if of_query[-1] == 0:
        raise ValueError(f"{op}: query has head_dim 0; it must be at least 1.")
    if of_key[-1] != of_query[-1]:
        raise ValueError(
            f"{op}: key has head_dim {of_key[-1]} but query has {of_query[-1]}; they must match."
        )
    heads, kv_heads = of_query[1], of_key[1]
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{op}: key has {kv_heads} heads but query has {heads}; key's must divide query's."
        )
    if of_value != of_key:
        if of_value[:-1] != of_key[:-1]:
            raise ValueError(
                f"{op}: value has shape {tuple(of_value)} but key has {tuple(of_key)}; they must "
                "match but for head_dim."
            )
        if of_value[-1] == 0:
            raise ValueError(f"{op}: value has head_dim 0; it must be at least 1.")
    if rank == 4 and of_key[0] != of_query[0]:
        raise ValueError(
            f"{op}: key has batch {of_key[0]} but query has {of_query[0]}; they must match."
        )


def options(op, query, batch, scale, causal, causal_offset, window, alibi_slopes, softcap):
    """Return the scale to use, and window's left and right."""
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}.")
    left, right = UNBOUNDED if window == UNBOUNDED else _window(op, window)
    if alibi_slopes is not None:
        _alibi(op, alibi_slopes, query, batch)
    if causal_offset is not None:
        integer(op, "causal_offset", causal_offset, " or None")
        if not causal and left < 0 and right < 0 and alibi_slopes is None:
            raise ValueError(
                f"{op}: causal_offset is {causal_offset} but causal is False, and there is neither "
                "a window nor alibi_slopes."
            )
    if softcap != 0.0:
        arguments.number(op, "softcap", softcap)
        if not (softcap >= 0.0 and math.isfinite(softcap)):
            raise ValueError(
                f"{op}: softcap is {softcap}; it must be finite and at least 0, which is off."
            )
    if scale is None:
        return query.shape[-1] ** -0.5, left, right
    arguments.number(op, "scale", scale)
    if scale != scale:
        raise ValueError(f"{op}: scale is {scale}; it must be a number.")
    return scale, left, right


def integer(op, name, value, otherwise=""):
    """`value` is an int, and no larger than a position; `otherwise` says what else may come."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int{otherwise}, got {type(value).__name__}.")
    if isinstance(value, int) and abs(value) > FARTHEST:
        raise ValueError(f"{op}: {name} is {value}; it must be between -2**31 and 2**31.")


def _window(op, window):
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window must be two ints, (left, right), got {window!r}.")
    for side in window:
        integer(op, "a side of window", side)
        if side < -1:
            raise ValueError(
                f"{op}: window is {tuple(window)}; both must be at least 0, or -1 for unbounded."
            )
    return window


def _alibi(op, slopes, query, batch):
    if not isinstance(slopes, Tensor):
        raise TypeError(f"{op}: alibi_slopes must be a tensor, got {type(slopes).__name__}.")
    if slopes.dtype not in (torch.float32, torch.promote_types(query.dtype, torch.float32)):
        raise TypeError(
            f"{op}: alibi_slopes has dtype {arguments.short(slopes.dtype)}; accepted is float32, "
            "and float64 where query is float64."
        )
    arguments.same_device(op, "alibi_slopes", slopes, "query", query)
    heads = query.shape[1]
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):
        raise ValueError(
            f"{op}: alibi_slopes has shape {tuple(slopes.shape)}; it must be (heads,) or "
            f"(batch, heads) = ({batch}, {heads})."
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: alibi_slopes requires a gradient, and there is none for it; detach it, or make "
            "a bias of it."
        )


def bias(op, bias, query, grid):
    """`bias` broadcasts to the grid of scores."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor, got {type(bias).__name__}.")
    if bias.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"{op}: bias has dtype {arguments.short(bias.dtype)}; accepted are bool, float32 and "
            f"query's {arguments.short(query.dtype)}."
        )
    arguments.same_device(op, "bias", bias, "query", query)
    aligned = zip(reversed(bias.shape), reversed(grid), strict=False)
    # no `in`: Dynamo takes symbolic sizes of equal value for different ones there
    if bias.dim() > 4 or any(size != 1 and size != full for size, full in aligned):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}; it must broadcast to "
            f"(batch, heads, T, S) = {tuple(grid)}."
        )
