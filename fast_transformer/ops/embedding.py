"""BERT's embedding layer: rows gathered, added up, normalised and dropped from, in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu


def embedding_norm(
    input_ids: Tensor,
    word: Tensor,
    position: Tensor | None = None,
    token_type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """dropout(layer_norm(word[id] + position[p] + type[t])), Devlin et al. 2019, figure 2.

    Args:
        input_ids: (..., T), int32 or int64; (tokens,) where sequences are packed.
        word: (V, C), float32, bfloat16, float16 or float64. Its gradient is dense.
        position: (positions, C), word's dtype.
        token_type: (types, C), word's dtype.
        weight: (C,), word's dtype or float32.
        bias: (C,), word's dtype or float32.
        position_ids: broadcastable to input_ids' shape; by default 0 … T − 1.
        token_type_ids: broadcastable to input_ids' shape; by default 0.
        eps: added to the variance.
        dropout_p: probability in [0, 1] of dropping an element of what the norm gives.
        seed: 0-d int64 tensor from which dropout draws; by default a fresh one each call.
        padding_idx: the row of word that gets no gradient.
        position_padding_idx: the row of position that gets no gradient.

    Returns:
        (..., T, C) of word's dtype, contiguous; sum and statistics are taken in float32.

    Raises:
        TypeError, ValueError: an argument is not as above. IndexError: an id names no row; from a
        compiled program RuntimeError. RuntimeError: see `backend`, `strict`.
    """
    _check(input_ids, word, position, token_type, weight, bias, eps)
    T, positions = input_ids.shape[-1], position is not None and position.shape[0]
    position_ids = _ids("position", position_ids, position, input_ids)
    token_type_ids = _ids("token_type", token_type_ids, token_type, input_ids)
    if position is not None and position_ids is None and T > positions:
        raise ValueError(
            f"embedding_norm: input_ids has length {T}, but position has {positions} rows; pass "
            "position_ids, or fewer tokens."
        )
    if padding_idx is not None:
        _padding("padding_idx", padding_idx, "word", word)
    if position_padding_idx is not None:
        _padding("position_padding_idx", position_padding_idx, "position", position)
    if dropout_p != 0.0 or seed is not None:
        seed = arguments.dropout("embedding_norm", dropout_p, seed, word.device)
    tables, ids = (word, position, token_type), (input_ids, position_ids, token_type_ids)
    backend = choose("embedding_norm", BACKENDS, (*tables, weight, bias, *ids, seed))
    if backend == "reference":
        _look_at_ids(ids, tables)
        return reference.embedding_norm(
            input_ids, *tables, weight, bias, position_ids=position_ids,
            token_type_ids=token_type_ids, eps=eps, dropout_p=dropout_p, seed=seed,
            padding_idx=padding_idx, position_padding_idx=position_padding_idx,
        )  # fmt: skip
    rows, row_ids = [_rows(t) for t in tables], [_whole(i) for i in ids]
    given = (row_ids[0], *rows, weight, bias, *row_ids[1:], seed, eps, dropout_p)
    call: Callable[..., Tensor] = _first
    inputs: tuple[Any, ...] = (BACKENDS[backend].forward, *given)
    if torch.is_grad_enabled() and any(
        [x is not None and x.requires_grad for x in (*tables, weight, bias)]
    ):
        call = cpu.apply
        inputs = (_EmbeddingNorm, backend, *given, padding_idx, position_padding_idx)
    if torch.compiler.is_compiling():
        return call(*inputs)
    try:
        return call(*inputs)
    except RuntimeError:  # the kernel has looked at the ids, at no cost here; this says it better
        _look_at_ids(ids, tables)
        raise


def _check(input_ids, word, position, token_type, weight, bias, eps):
    op = "embedding_norm"
    if not isinstance(word, Tensor) or word.dtype not in arguments.FLOATING:
        arguments.floating(op, "word", word)
    arguments.integer_tensor(op, "input_ids", input_ids, word, "word")
    if input_ids.dim() == 0:
        raise ValueError(f"{op}: input_ids has no dimension; it must have shape (..., T).")
    if word.dim() != 2:
        raise ValueError(f"{op}: word has shape {tuple(word.shape)}; it must be (V, C).")
    C = word.shape[1]
    dtype, device = word.dtype, word.device
    for name, table in (("position", position), ("token_type", token_type)):
        if table is not None and (
            not isinstance(table, Tensor)
            or table.dtype is not dtype
            or table.device != device
            or table.dim() != 2
            or table.shape[1] != C
        ):
            arguments.like(op, name, table, "word", word)
            raise ValueError(
                f"{op}: {name} has shape {tuple(table.shape)}; word's {C} channels ask for "
                f"(rows, {C})."
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (
            not isinstance(parameter, Tensor)
            or (parameter.dtype is not dtype and parameter.dtype is not torch.float32)
            or parameter.device != device
            or parameter.dim() != 1
            or parameter.shape[0] != C
        ):
            arguments.parameter(op, name, parameter, C, "word", word)
    if type(eps) is not float:
        arguments.number(op, "eps", eps)
    if eps < 0.0:
        raise ValueError(f"{op}: eps is {eps}; it must not be negative.")


def _ids(name, ids, table, input_ids):
    """Return one id of a table for each token, or None where there is none."""
    if ids is None:
        return None
    op, full = "embedding_norm", input_ids.shape
    if table is None:
        raise ValueError(f"{op}: {name}_ids are given, but {name} is None.")
    arguments.integer_tensor(op, f"{name}_ids", ids, input_ids, "input_ids")
    shape = ids.shape
    if shape == full:
        return ids
    aligned = zip(reversed(shape), reversed(full), strict=False)
    if len(shape) > len(full) or any(size != 1 and size != whole for size, whole in aligned):
        raise ValueError(
            f"{op}: {name}_ids has shape {tuple(shape)}; it must broadcast to input_ids' "
            f"{tuple(full)}."
        )
    return ids.expand(full)


def _padding(name, index, of, table):
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(
            f"embedding_norm: {name} must be an int or None, got {type(index).__name__}."
        )
    if table is None:
        raise ValueError(f"embedding_norm: {name} is {index}, but {of} is None.")
    if not 0 <= index < table.shape[0]:
        raise ValueError(
            f"embedding_norm: {name} is {index}; {of} has {table.shape[0]} rows, so it must lie in "
            f"[0, {table.shape[0]})."
        )


def _look_at_ids(ids, tables):
    """Raise where one names no row of its table, as far as values can be looked at."""
    names = ("input_ids", "position_ids", "token_type_ids"), ("word", "position", "token_type")
    for name, of, each, table in zip(*names, ids, tables, strict=True):
        if each is None or each.numel() == 0 or not arguments.readable(each):
            continue
        low, high = (x.item() for x in each.aminmax())
        rows = table.shape[0]
        if low < 0 or high >= rows:
            raise IndexError(
                f"embedding_norm: {name} holds {low if low < 0 else high}; {of} has {rows} rows, "
                f"so ids must lie in [0, {rows})."
            )


def _rows(table):
    return None if table is None else cpu.unit_stride(table)


def _whole(ids):
    """As the kernels take them."""
    return None if ids is None else (ids if ids.dtype is torch.int64 else ids.long()).contiguous()


def _first(function, *inputs):
    return function(*inputs)[0]


_forward, _backward = cpu.operator("embedding_norm_fwd"), cpu.operator("embedding_norm_bwd")

# forward(input_ids, word, position, token_type, weight, bias, position_ids, token_type_ids, seed,
# eps, dropout_p) → out, statistics; backward(grad_out, statistics, input_ids, word, position,
# token_type, weight, position_ids, token_type_ids, seed, dropout_p, padding_idx,
# position_padding_idx, need_word, need_position, need_token_type, need_weight, need_bias)
# → dword, dposition, dtoken_type, dweight, dbias
BACKENDS = {
    "cpu": Backend(_forward, _backward, cpu.unsupported),
    "reference": Backend(reference.embedding_norm, None, lambda tensors: None),
}


class _EmbeddingNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, backend, input_ids, word, position, token_type, weight, bias, position_ids,
        token_type_ids, seed, eps, dropout_p, padding_idx, position_padding_idx,
    ):  # fmt: skip
        out, statistics = BACKENDS[backend].forward(
            input_ids, word, position, token_type, weight, bias, position_ids, token_type_ids,
            seed, eps, dropout_p,
        )  # fmt: skip
        ctx.backend, ctx.dropout_p = backend, dropout_p
        ctx.padding = tuple(-1 if i is None else i for i in (padding_idx, position_padding_idx))
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            statistics, input_ids, word, position, token_type, weight, position_ids,
            token_type_ids, seed,
        )  # fmt: skip
        return out

    @staticmethod
    @cpu.first_order("embedding_norm")
    def backward(ctx, grad_out):
        needed = ctx.needs_input_grad[2:7]
        weight = ctx.saved_tensors[5]
        dtypes = (None, None, None, None if weight is None else weight.dtype, ctx.bias_dtype)
        grads = BACKENDS[ctx.backend].backward(
            cpu.uniform_rows(grad_out), *ctx.saved_tensors, ctx.dropout_p, *ctx.padding, *needed
        )
        wanted = (
            None if not need else dx if dtype is None else dx.to(dtype)
            for dx, need, dtype in zip(grads, needed, dtypes, strict=True)
        )  # fmt: skip
        return (None, None, *wanted, *(None,) * 7)


@cpu.fake("embedding_norm_fwd")
def _embedding_norm_fwd_fake(
    input_ids, word, position, token_type, weight, bias, position_ids, token_type_ids, seed, eps,
    dropout_p,
):  # fmt: skip
    out = word.new_empty((*input_ids.shape, word.shape[1]))
    return out, word.new_empty((2, input_ids.numel()), dtype=torch.float32)


@cpu.fake("embedding_norm_bwd")
def _embedding_norm_bwd_fake(
    grad_out, statistics, input_ids, word, position, token_type, weight, position_ids,
    token_type_ids, seed, dropout_p, padding_idx, position_padding_idx, need_word, need_position,
    need_token_type, need_weight, need_bias,
):  # fmt: skip
    tables = (need_word, word), (need_position, position), (need_token_type, token_type)
    C = word.shape[1]
    return (
        *(word.new_empty((t.shape[0], C) if need and t is not None else 0) for need, t in tables),
        word.new_empty(C if need_weight else 0, dtype=torch.float32),
        word.new_empty(C if need_bias else 0, dtype=torch.float32),
    )
