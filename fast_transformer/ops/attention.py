"""Scaled dot-product attention on batches and on packed sequences."""

from typing import Any

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    causal_offset: int | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | Any:  # a pair on request
    """softmax(Q Kᵀ · scale + bias) V, Vaswani et al. 2017, eq. 1, with dropout on the softmax.

    Args:
        query: (batch, heads, T, head_dim), float32, bfloat16, float16 or float64. Strides are
            honoured as long as the last dimension is contiguous.
        key: (batch, heads, S, head_dim).
        value: (batch, heads, S, head_dim).
        scale: by default 1 / √head_dim.
        causal: row i sees key j iff j ≤ i + causal_offset.
        causal_offset: by default S − T, so that the last row sees every key; 0 is top-left.
        key_starts: (batch,) int32 or int64; keys before are never read (left padding).
        key_lengths: (batch,) int32 or int64; keys from there on are never read (right padding).
        bias: broadcastable to (batch, heads, T, S); bool, where True attends, or added to the
            scaled scores, in query's dtype or float32.
        dropout_p: probability in [0, 1] of dropping an element of the softmax.
        seed: 0-d int64 tensor from which dropout draws; by default a fresh one each call.
        return_lse: return the natural logarithm of the softmax's denominator too.

    Returns:
        (batch, heads, T, head_dim), laid out in memory as (batch, T, heads, head_dim). With
        return_lse also (batch, heads, T) in float32, differentiable. A row that sees no key gives
        zeros and −inf, and no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    query, key, value, bias = _autocast(query, key, value, bias)
    _check_inputs("attention", query, key, value, "(batch, heads, length, head_dim)")
    B, H, T, _ = query.shape
    S = key.shape[2]
    if key.shape[0] != B:
        raise ValueError(
            f"attention: key has batch {key.shape[0]} but query has {B}; they must match."
        )
    scale = _check_options("attention", query, scale, causal, causal_offset)
    if key_starts is not None:
        key_starts = arguments.positions("attention", "key_starts", key_starts, B, S, query)
    if key_lengths is not None:
        key_lengths = arguments.positions("attention", "key_lengths", key_lengths, B, S, query)
    if bias is not None:
        _check_bias("attention", bias, query, (B, H, T, S))
    seed = arguments.dropout("attention", dropout_p, seed, query.device)

    tensors = (query, key, value, bias, key_starts, key_lengths, seed)
    backend = choose("attention", BACKENDS, tensors)
    if backend == "reference":
        out, lse = reference.attention(
            query, key, value, scale=scale, causal=causal, causal_offset=causal_offset,
            key_starts=key_starts, key_lengths=key_lengths, bias=bias,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return (out, lse) if return_lse else out
    if bias is not None:
        bias = _expand_bias(bias, (B, H, T, S))
    out, lse = _run(
        backend, query, key, value, bias, key_starts, key_lengths, None, None, seed,
        scale, causal, causal_offset, dropout_p,
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
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | Any:  # a pair on request
    """`attention` within each of the sequences that are packed one after another.

    Args:
        query: (tokens_q, heads, head_dim), dtypes and strides as for `attention`.
        key: (tokens_k, heads, head_dim).
        value: (tokens_k, heads, head_dim).
        cu_seqlens_q: (batch + 1,) int32 or int64, rising from 0 to tokens_q; sequence b holds the
            tokens [cu_seqlens_q[b], cu_seqlens_q[b + 1]).
        cu_seqlens_k: the same for the keys; the lengths may differ from the queries'.
        max_seqlen_q: no sequence of queries is longer.
        max_seqlen_k: no sequence of keys is longer.
        scale: by default 1 / √head_dim.
        causal: row i of a sequence sees its key j iff j ≤ i + causal_offset.
        causal_offset: by default that sequence's own S − T.
        bias: broadcastable to (batch, heads, max_seqlen_q, max_seqlen_k), by position within the
            sequence; otherwise as for `attention`.
        dropout_p: probability in [0, 1]; the mask is the one a padded batch would get.
        seed: 0-d int64 tensor from which dropout draws; by default a fresh one each call.
        return_lse: return the natural logarithm of the softmax's denominator too.

    Returns:
        (tokens_q, heads, head_dim). With return_lse also (heads, tokens_q) in float32.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    op = "attention_varlen"
    query, key, value, bias = _autocast(query, key, value, bias)
    _check_inputs(op, query, key, value, "(tokens, heads, head_dim)")
    scale = _check_options(op, query, scale, causal, causal_offset)
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
    grid = (cu_seqlens_q.shape[0] - 1, query.shape[1], max_seqlen_q, max_seqlen_k)
    if bias is not None:
        _check_bias(op, bias, query, grid)
    seed = arguments.dropout(op, dropout_p, seed, query.device)

    tensors = (query, key, value, bias, cu_seqlens_q, cu_seqlens_k, seed)
    backend = choose(op, BACKENDS, tensors)
    if backend == "reference":
        out, lse = reference.attention_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            scale=scale, causal=causal, causal_offset=causal_offset, bias=bias,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if bias is not None:
        bias = _expand_bias(bias, grid)
    out, lse = _run(
        backend, *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
        bias, None, None, cu_seqlens_q, cu_seqlens_k, seed,
        scale, causal, causal_offset, dropout_p,
    )  # fmt: skip
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def _autocast(query, key, value, bias):
    """Cast floating inputs as torch.autocast asks, but leave a float32 bias its precision."""
    dtype = arguments.autocast_dtype(query)
    if dtype is None:
        return query, key, value, bias
    query, key, value = (arguments.lower(x, dtype) for x in (query, key, value))
    if bias is not None and bias.dtype != torch.float32:
        bias = arguments.lower(bias, dtype)
    return query, key, value, bias


def _check_inputs(op, query, key, value, layout):
    """The three inputs agree with each other; `layout` names their dimensions."""
    arguments.floating(op, "query", query)
    arguments.like(op, "key", key, "query", query)
    arguments.like(op, "value", value, "query", query)
    rank = 4 if op == "attention" else 3
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != rank:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must be {layout}.")
    if query.shape[-1] == 0:
        raise ValueError(f"{op}: query has head_dim 0; it must be at least 1.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{op}: key has head_dim {key.shape[-1]} but query has {query.shape[-1]}; "
            "they must match."
        )
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{op}: key has {key.shape[1]} heads but query has {query.shape[1]}; they must match "
            "(grouped-query attention is not implemented yet)."
        )
    if value.shape != key.shape:
        raise ValueError(
            f"{op}: value has shape {tuple(value.shape)} but key has {tuple(key.shape)}; they must "
            "match (a head_dim of value's own is not implemented yet)."
        )


def _check_options(op, query, scale, causal, causal_offset):
    """Return the scale to use."""
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}.")
    if causal_offset is not None:
        if not isinstance(causal_offset, (int, torch.SymInt)):
            raise TypeError(
                f"{op}: causal_offset must be an int or None, got {type(causal_offset).__name__}."
            )
        if not causal:
            raise ValueError(f"{op}: causal_offset is {causal_offset} but causal is False.")
        if isinstance(causal_offset, int) and abs(causal_offset) > 2**31:
            raise ValueError(
                f"{op}: causal_offset is {causal_offset}; it must be between -2**31 and 2**31."
            )
    if scale is None:
        return query.shape[-1] ** -0.5
    arguments.number(op, "scale", scale)
    return scale


def _check_bias(op, bias, query, grid):
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
    if bias.dim() > 4 or any(size not in (1, full) for size, full in aligned):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}; it must broadcast to "
            f"(batch, heads, T, S) = {tuple(grid)}."
        )


def _expand_bias(bias, grid):
    """(batch, heads, T, S) without a copy, unless the kernels could not walk a row of it."""
    if bias.dim() == 0 or bias.shape[-1] != grid[-1]:
        bias = bias.expand(*bias.shape[:-1], grid[-1]).contiguous()
    return cpu.unit_stride(bias).expand(grid)


def _run(backend, query, key, value, *rest):
    query, key, value = cpu.unit_stride(query), cpu.unit_stride(key), cpu.unit_stride(value)
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return cpu.apply(_Attention, backend, query, key, value, *rest)
    return BACKENDS[backend].forward(query, key, value, *_all(rest), False)[:2]


def _all(rest):
    """With the options that are not offered yet."""
    return (*rest[:6], *[None] * 7, *rest[6:9], -1, -1, 0.0, 0, rest[9])


def _cpu_unsupported(tensors):
    bias = tensors[3]
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "a gradient for bias"
    return cpu.unsupported(tensors)


_forward, _backward = cpu.operator("attention_fwd"), cpu.operator("attention_bwd")

# forward(query, key, value, bias, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, seed,
# scale, causal, causal_offset, dropout_p, save_softmax) → out, lse, softmax; backward: grad_out and
# grad_lse before query, out and softmax before bias. Packed sequences come as
# (1, heads, tokens, head_dim); softmax is what common/attention.h says, for backward alone.
BACKENDS = {
    "cpu": Backend(_forward, _backward, _cpu_unsupported),
    "reference": Backend(reference.attention, None, lambda tensors: None),
}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, query, key, value, *rest):
        out, lse, softmax = BACKENDS[backend].forward(query, key, value, *_all(rest), True)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.options = backend, rest[6:]
        ctx.save_for_backward(query, key, value, out, softmax, *rest[:6])
        return out, lse

    @staticmethod
    @cpu.first_order("attention")
    def backward(ctx, grad_out, grad_lse):
        saved = ctx.saved_tensors
        grad_out = torch.zeros_like(saved[3]) if grad_out is None else cpu.unit_stride(grad_out)
        rest = _all((*saved[5:], *ctx.options))
        grads = BACKENDS[ctx.backend].backward(grad_out, grad_lse, *saved[:5], *rest, False)[:3]
        needed = ctx.needs_input_grad[1:4]
        return None, *(g if n else None for g, n in zip(grads, needed, strict=True)), *[None] * 10


def _head_minor(x):
    """Like x (batch, heads, length, head_dim), in memory (batch, length, heads, head_dim)."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@cpu.fake("attention_fwd")
def _attention_fwd_fake(query, key, value, *rest):
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    save_softmax = rest[-1]
    return _head_minor(query), lse, lse.new_empty((*lse.shape, 2) if save_softmax else 0)


@cpu.fake("attention_bwd")
def _attention_bwd_fake(grad_out, grad_lse, query, key, value, *rest):
    nothing = query.new_empty(0, dtype=torch.float32)
    return (_head_minor(query), _head_minor(key), _head_minor(value), *[nothing] * 5)
