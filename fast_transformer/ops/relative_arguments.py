"""What `relative_attention` asks of the arguments that `attention` does not have."""

import torch
from torch import Tensor

from fast_transformer.ops import arguments
from fast_transformer.ops import attention_arguments as check

OP = "relative_attention"
_NEEDS = {  # what an argument has no meaning without
    "position_bias": ("position_key",),
    "position_zero": ("position_key", "distance_bias"),
    "segment_bias": ("segment_key",),
    "query_segments": ("segment_key",),
    "key_segments": ("segment_key",),
}


def autocast(query, *tensors):
    """Cast `tensors`, of which any may be None, as torch.autocast asks for what multiplies."""
    dtype = arguments.autocast_dtype(query)
    return tensors if dtype is None else tuple(arguments.lower(x, dtype) for x in tensors)


def companions(**given):
    """Arguments that have a meaning only together are given together."""
    for name, others in _NEEDS.items():
        if given[name] is not None and all(given[other] is None for other in others):
            raise ValueError(f"{OP}: {name} is given, but not {' or '.join(others)}.")
    for name in ("query_segments", "key_segments"):
        if given["segment_key"] is not None and given[name] is None:
            raise ValueError(f"{OP}: segment_key is given, but not {name}.")
    if given["position_zero"] is not None:
        check.integer(OP, "position_zero", given["position_zero"], " or None")


def tables(query, key, position_key, segment_key, distance_bias, **biases):
    """The tables and biases fit query's heads and head_dim."""
    H, D = query.shape[1], query.shape[3]
    for name, x, first in (("position_key", position_key, "L"), ("segment_key", segment_key, 2)):
        if x is None:
            continue
        arguments.like(OP, name, x, "query", query)
        if x.dim() != 3 or x.shape[1:] != (H, D) or (first == 2 and x.shape[0] != 2):
            raise ValueError(
                f"{OP}: {name} has shape {tuple(x.shape)}; it must be ({first}, heads, head_dim) = "
                f"({first}, {H}, {D})."
            )
        if key.shape[1] != H:
            raise ValueError(
                f"{OP}: key has {key.shape[1]} heads but query has {H}; with {name} they must "
                "match."
            )
    for name, x in biases.items():
        if x is None:
            continue
        arguments.like(OP, name, x, "query", query)
        if x.shape != (H, D):
            raise ValueError(
                f"{OP}: {name} has shape {tuple(x.shape)}; it must be (heads, head_dim) = "
                f"({H}, {D})."
            )
    if distance_bias is not None:
        _distance_bias(distance_bias, query)
        if position_key is not None and distance_bias.shape[1] != position_key.shape[0]:
            raise ValueError(
                f"{OP}: distance_bias has {distance_bias.shape[1]} columns but position_key has "
                f"{position_key.shape[0]} rows; they must match."
            )


def _distance_bias(x, query):
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: distance_bias must be a tensor, got {type(x).__name__}.")
    if x.dtype not in (torch.float32, query.dtype):
        raise TypeError(
            f"{OP}: distance_bias has dtype {arguments.short(x.dtype)}; accepted are float32 and "
            f"query's {arguments.short(query.dtype)}."
        )
    arguments.same_device(OP, "distance_bias", x, "query", query)
    if x.dim() != 2 or (x.shape[0] != 1 and x.shape[0] != query.shape[1]):
        raise ValueError(
            f"{OP}: distance_bias has shape {tuple(x.shape)}; it must be (heads, L) = "
            f"({query.shape[1]}, L), or (1, L)."
        )


def reach(T, S, diagonal, causal, left, right):
    """The smallest and the largest j − i of the pairs that causal and window leave."""
    if T == 0 or S == 0:
        return 0, -1
    nearest, farthest = 1 - T, S - 1
    if left >= 0:
        nearest = max(nearest, diagonal - left)
    if causal:
        farthest = min(farthest, diagonal)
    if right >= 0:
        farthest = min(farthest, diagonal + right)
    return nearest, farthest


def rows(name, count, position_zero, nearest, farthest):
    """`name` has the row of every distance from `nearest` to `farthest`."""
    first, last = position_zero + nearest, position_zero + farthest
    if count < 1 or (nearest <= farthest and (first < 0 or last >= count)):
        raise ValueError(
            f"{OP}: {name} has {count} rows, and row p stands for j - i = p - position_zero, which "
            f"is {position_zero}; j - i runs from {nearest} to {farthest} where a row may see a "
            f"key, so the rows {first} to {last} must exist."
        )


def segments(name, x, shape, query):
    """Return `x` as contiguous int32 of `shape`."""
    arguments.integer_tensor(OP, name, x, query)
    if x.shape != shape:
        raise ValueError(
            f"{OP}: {name} has shape {tuple(x.shape)}; it must be (batch, length) = {shape}."
        )
    return x.to(torch.int32).contiguous()
