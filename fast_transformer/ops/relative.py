"""Attention whose scores know how far a key lies from its query: Transformer-XL, XLNet, T5."""

import math
from typing import Any

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu
from fast_transformer.ops import attention_arguments as check
from fast_transformer.ops import relative_arguments as check_relative
from fast_transformer.ops.attention import BACKENDS as ATTENTION
from fast_transformer.ops.attention import run, whole_rows

OP = "relative_attention"


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position_key: Tensor | None = None,
    position_zero: int | None = None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    segment_key: Tensor | None = None,
    segment_bias: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    distance_bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    causal_offset: int | None = None,
    window: tuple[int, int] = check.UNBOUNDED,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | Any:  # a pair on request
    """`attention` by content, distance and segment, without a (T × S) tensor of any of them.

    The score of query i and key j, with p = position_zero + j − i, and s = 0 where both have the
    same segment, else 1 (Dai et al. 2019, eq. 4; Yang et al. 2019, § 2.5):

        scale · ((q_i + content_bias) · k_j + (q_i + position_bias) · position_key[p]
                 + (q_i + segment_bias) · segment_key[s])

    Then come softcap, and what is added: distance_bias[h, p], bias and ALiBi.

    Args:
        query, key, value: as for `attention`, but that key has query's heads where position_key or
            segment_key is given.
        position_key: (L, heads, head_dim), query's dtype; row p stands for j − i =
            p − position_zero. In the papers it is the projected sinusoid of i − j, which descends.
        position_zero: by default T, XLNet's layout with L = T + S; Transformer-XL's, with L = S
            and causal, is T − 1.
        content_bias, position_bias, segment_bias: (heads, head_dim), query's dtype; u, v of the
            first paper, b of the second.
        segment_key: (2, heads, head_dim), query's dtype; comes with both segments.
        query_segments: (batch, T), int32 or int64.
        key_segments: (batch, S), int32 or int64.
        distance_bias: (heads, L) or (1, L), float32 or query's dtype, such as T5's
            `table[t5_buckets(...)].T`; L is that of position_key where both are given.
        scale, causal, causal_offset, window, key_starts, key_lengths, bias, alibi_slopes, softcap,
            dropout_p, seed, return_lse: as for `attention`.

    Returns:
        As `attention`. Gradients reach every floating tensor but alibi_slopes.

    Raises:
        TypeError, ValueError: an argument is not as above, or position_key or distance_bias lacks a
            row that a pair asks for which causal and window leave. RuntimeError: see `backend`,
            `strict`.
    """
    query, key, value, bias = check.autocast(query, key, value, bias)
    position_key, content_bias, position_bias, segment_key, segment_bias = check_relative.autocast(
        query, position_key, content_bias, position_bias, segment_key, segment_bias
    )
    check.inputs(OP, query, key, value, "(batch, heads, length, head_dim)")
    B, H, T, _ = query.shape
    S = key.shape[2]
    scale, left, right = check.options(
        OP, query, B, scale, causal, causal_offset, window, alibi_slopes, softcap
    )
    check_relative.companions(
        position_key=position_key, position_zero=position_zero, position_bias=position_bias,
        segment_key=segment_key, segment_bias=segment_bias, query_segments=query_segments,
        key_segments=key_segments, distance_bias=distance_bias,
    )  # fmt: skip
    check_relative.tables(
        query, key, position_key, segment_key, distance_bias,
        content_bias=content_bias, position_bias=position_bias, segment_bias=segment_bias,
    )  # fmt: skip
    position_zero = T if position_zero is None else position_zero
    diagonal = S - T if causal_offset is None else causal_offset
    nearest, farthest = check_relative.reach(T, S, diagonal, causal, left, right)
    for name, x, dimension in (
        ("position_key", position_key, 0),
        ("distance_bias", distance_bias, 1),
    ):
        if x is not None:
            check_relative.rows(name, x.shape[dimension], position_zero, nearest, farthest)
    if segment_key is not None:
        query_segments = check_relative.segments("query_segments", query_segments, (B, T), query)
        key_segments = check_relative.segments("key_segments", key_segments, (B, S), query)
    if key_starts is not None:
        key_starts = arguments.positions(OP, "key_starts", key_starts, B, S, query)
    if key_lengths is not None:
        key_lengths = arguments.positions(OP, "key_lengths", key_lengths, B, S, query)
    if bias is not None:
        check.bias(OP, bias, query, (B, H, T, S))
    seed = arguments.dropout(OP, dropout_p, seed, query.device)

    tensors = (
        query, key, value, position_key, content_bias, position_bias, segment_key, segment_bias,
        query_segments, key_segments, distance_bias, key_starts, key_lengths, bias, alibi_slopes,
        seed,
    )  # fmt: skip
    backend = choose(OP, BACKENDS, tensors)
    if backend == "reference":
        out, lse = reference.relative_attention(
            query, key, value, position_key=position_key, position_zero=position_zero,
            content_bias=content_bias, position_bias=position_bias, segment_key=segment_key,
            segment_bias=segment_bias, query_segments=query_segments, key_segments=key_segments,
            distance_bias=distance_bias, scale=scale, causal=causal, causal_offset=causal_offset,
            window=(left, right), key_starts=key_starts, key_lengths=key_lengths, bias=bias,
            alibi_slopes=alibi_slopes, softcap=softcap, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return (out, lse) if return_lse else out

    position_query = segment_scores = None
    if position_key is not None:
        position_query = cpu.unit_stride(_plus(query, position_bias))
        position_key = cpu.unit_stride(position_key.transpose(0, 1).unsqueeze(0))
    if segment_key is not None:
        # two numbers for each row; which of them a pair takes, the kernel sees
        segment_scores = _plus(query, segment_bias) @ segment_key.permute(1, 2, 0)
        segment_scores = segment_scores.float().contiguous()
    if distance_bias is not None:
        distance_bias = distance_bias.float().expand(H, -1).contiguous()
    if bias is not None:
        bias = whole_rows(bias, S)
    out, lse = run(
        backend, _plus(query, content_bias), key, value, bias, key_starts, key_lengths, None, None,
        seed, alibi_slopes, distance_bias, position_query, position_key, segment_scores,
        query_segments, key_segments,
        scale, causal, causal_offset, left, right, softcap, position_zero, dropout_p,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def t5_buckets(
    relative_position: Tensor,
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Tensor:
    """T5's bucket of each distance j − i, Raffel et al. 2020, § 2.1.

    Half of the buckets are for one distance each; the others grow with its logarithm up to
    max_distance, and the last one takes all that is farther. With bidirectional, keys behind the
    query have one half of the buckets and keys ahead the other; without, keys ahead share bucket 0.

    Args:
        relative_position: integers of any shape.
        bidirectional: True in T5's encoder, False in its decoder.
        num_buckets: at least 2, with bidirectional even and at least 4.
        max_distance: larger than the number of buckets for one distance each.

    Returns:
        int64 of the same shape, in [0, num_buckets).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    op = "t5_buckets"
    if not isinstance(relative_position, Tensor):
        got = type(relative_position).__name__
        raise TypeError(f"{op}: relative_position must be a tensor, got {got}.")
    if relative_position.is_floating_point() or relative_position.dtype == torch.bool:
        got = arguments.short(relative_position.dtype)
        raise TypeError(f"{op}: relative_position has dtype {got}; accepted are integers.")
    check.integer(op, "num_buckets", num_buckets)
    check.integer(op, "max_distance", max_distance)
    sides = 2 if bidirectional else 1
    if num_buckets < 2 * sides or num_buckets % sides:
        asked = "even and at least 4" if bidirectional else "at least 2"
        raise ValueError(f"{op}: num_buckets is {num_buckets}; it must be {asked}.")
    of_side = num_buckets // sides
    exact = of_side // 2
    if max_distance <= exact:
        raise ValueError(f"{op}: max_distance is {max_distance}; it must be larger than {exact}.")

    behind = -relative_position.long()
    distance = behind.abs() if bidirectional else behind.clamp(min=0)
    # T5's own steps, in float32: another order would put a few distances into another bucket
    part = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    grown = exact + (part * (of_side - exact)).clamp(min=0).long()
    bucket = torch.where(distance < exact, distance, grown.clamp(max=of_side - 1))
    return bucket + (behind < 0) * of_side if bidirectional else bucket


def _plus(query, bias):
    """Query (batch, heads, T, head_dim) + bias (heads, head_dim), if there is one."""
    return query if bias is None else query + bias[:, None]


# The kernels of `attention` do the work: relative positions are one term more of their scores.
BACKENDS = {
    "cpu": ATTENTION["cpu"],
    "reference": Backend(reference.relative_attention, None, lambda tensors: None),
}
