"""Scaled dot-product attention on batches and on packed sequences."""

from typing import Any

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu
from fast_transformer.ops import attention_arguments as check


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
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
    """softmax(Q Kᵀ · scale + bias) V, Vaswani et al. 2017, eq. 1, with dropout on the softmax.

    Args:
        query: (batch, heads, T, head_dim), float32, bfloat16, float16 or float64. Strides are
            honoured as long as the last dimension is contiguous.
        key: (batch, kv_heads, S, head_dim); kv_heads divides heads, and head h attends to key head
            h // (heads / kv_heads).
        value: (batch, kv_heads, S, value_dim).
        scale: by default 1 / √head_dim.
        causal: row i sees key j iff j ≤ i + diagonal.
        causal_offset: the diagonal; by default S − T, so that the last row sees every key; 0 is
            top-left. Only with causal, a window or alibi_slopes.
        window: (left, right), −1 for unbounded; row i sees key j iff
            i + diagonal − left ≤ j ≤ i + diagonal + right.
        key_starts: (batch,) int32 or int64; keys before are never read (left padding).
        key_lengths: (batch,) int32 or int64; keys from there on are never read (right padding).
        bias: broadcastable to (batch, heads, T, S); bool, where True attends, or added to the
            scaled scores, in query's dtype or float32. Differentiable.
        alibi_slopes: (heads,) or (batch, heads), float32, without a gradient; subtracts
            slope · |i + diagonal − j| from the scores (Press et al. 2022).
        softcap: c > 0 makes a scaled score c · tanh(score / c) before bias and slopes; 0 is off.
        dropout_p: probability in [0, 1] of dropping an element of the softmax.
        seed: 0-d int64 tensor from which dropout draws; by default a fresh one each call.
        return_lse: return the natural logarithm of the softmax's denominator too.

    Returns:
        (batch, heads, T, value_dim), laid out in memory as (batch, T, heads, value_dim). With
        return_lse also (batch, heads, T) in float32, differentiable. A row that sees no key gives
        zeros and −inf, and no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    query, key, value, bias = check.autocast(query, key, value, bias)
    check.inputs("attention", query, key, value, "(batch, heads, length, head_dim)")
    B, H, T, _ = query.shape
    S = key.shape[2]
    scale, left, right = check.options(
        "attention", query, B, scale, causal, causal_offset, window, alibi_slopes, softcap
    )
    if key_starts is not None:
        key_starts = arguments.positions("attention", "key_starts", key_starts, B, S, query)
    if key_lengths is not None:
        key_lengths = arguments.positions("attention", "key_lengths", key_lengths, B, S, query)
    if bias is not None:
        check.bias("attention", bias, query, (B, H, T, S))
    seed = arguments.dropout("attention", dropout_p, seed, query.device)

    tensors = (query, key, value, bias, key_starts, key_lengths, seed, alibi_slopes)
    backend = choose("attention", BACKENDS, tensors)
    if backend == "reference":
        out, lse = reference.attention(
            query, key, value, scale=scale, causal=causal, causal_offset=causal_offset,
            window=(left, right), key_starts=key_starts, key_lengths=key_lengths, bias=bias,
            alibi_slopes=alibi_slopes, softcap=softcap, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return (out, lse) if return_lse else out
    if bias is not None:
        bias = whole_rows(bias, S)
    out, lse = run(
        backend, query, key, value, bias, key_starts, key_lengths, None, None, seed, alibi_slopes,
        None, None, None, None, None, None,
        scale, causal, causal_offset, left, right, softcap, 0, dropout_p,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    causal_offset: int | None = None,
    window: tuple[int, int] = check.UNBOUNDED,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | Any:  # a pair on request
    """`attention` within each of the sequences that are packed one after another.

    Args:
        query: (tokens_q, heads, head_dim), dtypes and strides as for `attention`.
        key: (tokens_k, kv_heads, head_dim).
        value: (tokens_k, kv_heads, value_dim).
        cu_seqlens_q: (batch + 1,) int32 or int64, rising from 0 to tokens_q; sequence b holds the
            tokens [cu_seqlens_q[b], cu_seqlens_q[b + 1]).
        cu_seqlens_k: the same for the keys; the lengths may differ from the queries'.
        max_seqlen_q: no sequence of queries is longer.
        max_seqlen_k: no sequence of keys is longer.
        scale: by default 1 / √head_dim.
        causal: row i of a sequence sees its key j iff j ≤ i + diagonal.
        causal_offset: the diagonal; by default that sequence's own S − T.
        window: as for `attention`, along each sequence's diagonal.
        bias: broadcastable to (batch, heads, max_seqlen_q, max_seqlen_k), by position within the
            sequence; otherwise as for `attention`.
        alibi_slopes: as for `attention`, along each sequence's diagonal.
        softcap: as for `attention`.
        dropout_p: probability in [0, 1]; the mask is the one a padded batch would get.
        seed: 0-d int64 tensor from which dropout draws; by default a fresh one each call.
        return_lse: return the natural logarithm of the softmax's denominator too.

    Returns:
        (tokens_q, heads, value_dim). With return_lse also (heads, tokens_q) in float32.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    op = "attention_varlen"
    query, key, value, bias = check.autocast(query, key, value, bias)
    check.inputs(op, query, key, value, "(tokens, heads, head_dim)")
    arguments.number(op, "max_seqlen_q", max_seqlen_q)
    arguments.number(op, "max_seqlen_k", max_seqlen_k)
    same = cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q
    same = same and key.shape[0] == query.shape[0]
    cu_seqlens_q = arguments.offsets(
        op, "cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q, query
    )
    cu_seqlens_k = cu_seqlens_q if same else arguments.offsets(
        op, "cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k, query
    )  # fmt: skip
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k holds {cu_seqlens_k.shape[0]} offsets but cu_seqlens_q holds "
            f"{cu_seqlens_q.shape[0]}; they must match."
        )
    B, H = cu_seqlens_q.shape[0] - 1, query.shape[1]
    scale, left, right = check.options(
        op, query, B, scale, causal, causal_offset, window, alibi_slopes, softcap
    )
    if bias is not None:
        check.bias(op, bias, query, (B, H, max_seqlen_q, max_seqlen_k))
    seed = arguments.dropout(op, dropout_p, seed, query.device)

    tensors = (query, key, value, bias, cu_seqlens_q, cu_seqlens_k, seed, alibi_slopes)
    backend = choose(op, BACKENDS, tensors)
    if backend == "reference":
        out, lse = reference.attention_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            scale=scale, causal=causal, causal_offset=causal_offset, window=(left, right),
            bias=bias, alibi_slopes=alibi_slopes, softcap=softcap, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if bias is not None:
        bias = whole_rows(bias, max_seqlen_k)
    out, lse = run(
        backend, *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
        bias, None, None, cu_seqlens_q, cu_seqlens_k, seed, alibi_slopes,
        None, None, None, None, None, None,
        scale, causal, causal_offset, left, right, softcap, 0, dropout_p,
    )  # fmt: skip
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def whole_rows(bias, S):
    """`bias` as four dimensions, the last of S contiguous elements; the others may stay 1."""
    if bias.dim() < 4:
        bias = bias.view(*[1] * (4 - bias.dim()), *bias.shape)
    if bias.shape[-1] != S:
        # in float32 where it is a number, so that the gradient's sum over keys is rounded once
        bias = bias if bias.dtype == torch.bool else bias.float()
        bias = bias.expand(*bias.shape[:-1], S).contiguous()
    return cpu.unit_stride(bias)


def run(
    backend, query, key, value, bias, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed,
    alibi_slopes, distance_bias, position_query, position_key, segment_scores, query_segments,
    key_segments, *options,
):  # fmt: skip
    """Run a backend, with autograd above it where needed; arguments as `BACKENDS` lists them."""
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    tensors = (
        cpu.unit_stride(query), cpu.unit_stride(key), cpu.unit_stride(value), bias,
        key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed,
        alibi_slopes, distance_bias, position_query, position_key, segment_scores, query_segments,
        key_segments,
    )  # fmt: skip
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (bias is not None and bias.requires_grad)
        or (distance_bias is not None and distance_bias.requires_grad)
        or (position_query is not None and position_query.requires_grad)
        or (position_key is not None and position_key.requires_grad)
        or (segment_scores is not None and segment_scores.requires_grad)
    ):
        return cpu.apply(_Attention, backend, options, *tensors)
    return BACKENDS[backend].forward(*tensors, *options, False)[:2]


_forward, _backward = cpu.operator("attention_fwd"), cpu.operator("attention_bwd")

# forward(query, key, value,
#   bias, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, alibi_slopes, distance_bias,
#   position_query, position_key, segment_scores, query_segments, key_segments,
#   scale, causal, causal_offset, window_left, window_right, softcap, position_zero, dropout_p,
#   save_softmax) → out, lse, softmax
# backward(grad_out, grad_lse, query, key, value, out, softmax, bias … dropout_p, need_dbias)
#   → gradients of query, key, value, bias, distance_bias, position_query, position_key,
#   segment_scores, without elements where there is no such input
# Packed sequences come as (1, heads, tokens, head_dim); softmax is what common/attention.h says,
# for backward alone.
BACKENDS = {
    "cpu": Backend(_forward, _backward, cpu.unsupported),
    "reference": Backend(reference.attention, None, lambda tensors: None),
}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, options, query, key, value, *others):
        out, lse, softmax = BACKENDS[backend].forward(query, key, value, *others, *options, True)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(query, key, value, out, softmax, *others)
        return out, lse

    @staticmethod
    @cpu.first_order("attention")
    def backward(ctx, grad_out, grad_lse):
        saved = ctx.saved_tensors
        grad_out = torch.zeros_like(saved[3]) if grad_out is None else cpu.unit_stride(grad_out)
        needed = ctx.needs_input_grad[2:]
        grads = BACKENDS[ctx.backend].backward(grad_out, grad_lse, *saved, *ctx.options, needed[3])
        dq, dk, dv, dbias, *of_positions = (
            g if n else None for g, n in zip(grads, (*needed[:4], *needed[10:14]), strict=True)
        )
        if dbias is not None:
            dbias = dbias.to(saved[5].dtype)
        return None, None, dq, dk, dv, dbias, *[None] * 6, *of_positions, None, None


def _head_minor(x, head_dim):
    """Like x (batch, heads, length, …), in memory (batch, length, heads, head_dim)."""
    B, H, T, _ = x.shape
    return x.new_empty(B, T, H, head_dim).transpose(1, 2)


@cpu.fake("attention_fwd")
def _attention_fwd_fake(query, key, value, *rest):
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    save_softmax = rest[-1]
    softmax = lse.new_empty((*lse.shape, 2) if save_softmax else 0)
    return _head_minor(query, value.shape[-1]), lse, softmax


@cpu.fake("attention_bwd")
def _attention_bwd_fake(grad_out, grad_lse, query, key, value, out, softmax, bias, *rest):
    distance_bias, position_query, position_key, segment_scores = rest[6:10]
    need_dbias = rest[-1]
    return (
        *(_head_minor(x, x.shape[-1]) for x in (query, key, value)),
        softmax.new_empty(bias.shape if need_dbias else 0),
        softmax.new_empty(0 if distance_bias is None else distance_bias.shape),
        *(
            query.new_empty(0) if x is None else _head_minor(x, x.shape[-1])
            for x in (position_query, position_key)
        ),
        softmax.new_empty(0 if segment_scores is None else segment_scores.shape),
    )
