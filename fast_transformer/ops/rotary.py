"""Rotary position embeddings of query and key."""

from typing import Any

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu


def rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor | Any:  # a pair where there is a key
    """Turn each pair of columns by its position's angle, Su et al. 2021, eq. 34.

    Args:
        query: (batch, heads, T, head_dim), float32, bfloat16, float16 or float64. Strides are
            honoured as long as the last dimension is contiguous, so that a transposed
            (batch, T, heads, head_dim) is not copied. Or packed, (tokens, heads, head_dim).
        key: the same with a number of heads of its own; None turns query alone.
        cos: (T, R/2), or (batch, T, R/2) where each sequence has positions of its own, or
            (tokens, R/2) for packed ones; the cosines of the angles, in query's dtype or float32.
            The first R ≤ head_dim columns turn, the others pass through.
        sin: cos's shape and dtype. Neither has a gradient.
        interleaved: pair j is the columns 2j and 2j + 1, as in GPT-J; by default j and j + R/2,
            as in GPT-NeoX and LLaMA.

    Returns:
        (query, key) turned, or query alone where key is None; of their shapes and dtypes, laid out
        in memory in the order of their dimensions there.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    _check(query, key, cos, sin, interleaved)
    backend = choose("rotary", BACKENDS, (query, key, cos, sin))
    packed = query.dim() == 3
    if packed:
        query = query.transpose(0, 1)[None]
        key = None if key is None else key.transpose(0, 1)[None]
    if backend == "reference":
        outs = reference.rotary(query, key, cos, sin, interleaved=interleaved)
        outs = [
            out if out is None else _laid_out_as(x, out)
            for x, out in zip((query, key), outs, strict=True)
        ]
    else:
        query, cos, sin = cpu.unit_stride(query), cpu.unit_stride(cos), cpu.unit_stride(sin)
        key = None if key is None else cpu.unit_stride(key)
        outs = _turn(backend, query, key, cos, sin, interleaved, False)
    out, out_key = outs
    if packed:
        out = out[0].transpose(0, 1)
        out_key = None if key is None else out_key[0].transpose(0, 1)
    return out if key is None else (out, out_key)


def _check(query, key, cos, sin, interleaved):
    if not isinstance(query, Tensor) or query.dtype not in arguments.FLOATING:
        arguments.floating("rotary", "query", query)
    shape, dtype = query.shape, query.dtype
    rank = len(shape)
    if rank != 4 and rank != 3:
        raise ValueError(
            f"rotary: query has shape {tuple(shape)}; it must be "
            "(batch, heads, length, head_dim) or (tokens, heads, head_dim)."
        )
    if key is not None:
        arguments.like("rotary", "key", key, "query", query)
        of_key, last = key.shape, rank - 1
        # size by size: in slices Dynamo takes symbolic sizes of equal value for different ones
        if (
            len(of_key) != rank
            or of_key[last] != shape[last]
            or of_key[0] != shape[0]
            or (rank == 4 and of_key[2] != shape[2])
        ):
            raise ValueError(
                f"rotary: key has shape {tuple(of_key)} but query has {tuple(shape)}; they must "
                "match but for the heads."
            )
    if not isinstance(interleaved, bool):
        raise TypeError(f"rotary: interleaved must be a bool, got {type(interleaved).__name__}.")
    for table in (cos, sin):
        if (
            not isinstance(table, Tensor)
            or (table.dtype is not dtype and table.dtype is not torch.float32)
            or table.device != query.device
            or (table.requires_grad and torch.is_grad_enabled())
        ):
            _reject("cos" if table is cos else "sin", table, query)
    batch, length = (shape[0], shape[2]) if rank == 4 else (1, shape[0])
    rows = cos.shape
    of_batch = len(rows) == 2 or (len(rows) == 3 and (rows[0] == 1 or rows[0] == batch))
    if not of_batch or rows[-2] != length:
        accepted = f"({length}, R/2)"
        if rank == 4:
            accepted += f" or ({batch}, {length}, R/2)"
        raise ValueError(
            f"rotary: cos has shape {tuple(rows)}; query of {tuple(shape)} asks for {accepted}, "
            "one row for each position."
        )
    if 2 * rows[-1] > shape[-1]:
        raise ValueError(
            f"rotary: cos has {rows[-1]} columns, one for each pair; query's head_dim {shape[-1]} "
            f"has {shape[-1] // 2} pairs. Where cos repeats itself, pass its first half."
        )
    if sin.shape != rows or sin.dtype is not cos.dtype:
        raise ValueError(
            f"rotary: sin is {tuple(sin.shape)} of {arguments.short(sin.dtype)} but cos is "
            f"{tuple(rows)} of {arguments.short(cos.dtype)}; they must match."
        )


def _reject(name, table, query):
    if not isinstance(table, Tensor):
        raise TypeError(f"rotary: {name} must be a tensor, got {type(table).__name__}.")
    arguments.same_device("rotary", name, table, "query", query)
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"rotary: {name} requires a gradient, and there is none for it; detach it."
        )
    raise TypeError(
        f"rotary: {name} has dtype {arguments.short(table.dtype)}; accepted are float32 and "
        f"query's {arguments.short(query.dtype)}."
    )


def _turn(backend, query, key, cos, sin, interleaved, inverse):
    """Both, differentiably."""
    inputs = query, key, cos, sin, interleaved, inverse
    if torch.is_grad_enabled() and (query.requires_grad or (key is not None and key.requires_grad)):
        return cpu.apply(_Rotary, backend, *inputs)
    return BACKENDS[backend].forward(*inputs)


def _memory_order(x):
    """Return the dimensions but the last, outermost in memory first."""
    order = [0]
    for d in range(1, x.dim() - 1):  # sorted by hand: Dynamo does not sort symbolic strides
        i = len(order)
        while i > 0 and x.stride(order[i - 1]) < x.stride(d):
            i -= 1
        order.insert(i, d)
    return order


def _laid_out_as(x, out):
    order = [*_memory_order(x), x.dim() - 1]
    return out.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


_rotary = cpu.operator("rotary")

# forward(query, key, cos, sin, interleaved, inverse) → out, out_key; it is its own gradient, with
# the other `inverse`
BACKENDS = {
    "cpu": Backend(_rotary, _rotary, cpu.unsupported),
    "reference": Backend(reference.rotary, None, lambda tensors: None),
}


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, query, key, cos, sin, interleaved, inverse):
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.interleaved, ctx.inverse = backend, interleaved, inverse
        ctx.save_for_backward(cos, sin)
        out, out_key = BACKENDS[backend].forward(query, key, cos, sin, interleaved, inverse)
        if key is None:
            ctx.mark_non_differentiable(out_key)
        return out, out_key

    @staticmethod
    def backward(ctx, dout, dout_key):
        _, for_query, for_key, *_ = ctx.needs_input_grad
        grads = [
            cpu.unit_stride(grad) if wanted and grad is not None else None
            for wanted, grad in ((for_query, dout), (for_key, dout_key))
        ]
        first, second = grads if grads[0] is not None else (grads[1], None)
        if first is None:
            return (None,) * 7
        turned = _turn(
            ctx.backend, first, second, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse
        )
        dquery = turned[0] if grads[0] is not None else None
        dkey = turned[1] if second is not None else turned[0] if grads[1] is not None else None
        return (None, dquery, dkey, None, None, None, None)


@cpu.fake("rotary")
def _rotary_fake(query, key, cos, sin, interleaved, inverse):
    def like(x):
        order = [*_memory_order(x), 3]
        dense = x.new_empty([x.shape[d] for d in order])
        return dense.permute([order.index(d) for d in range(4)])

    return like(query), query.new_empty(0) if key is None else like(key)
