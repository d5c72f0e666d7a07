"""Attention of a few query rows on a cache of keys and values, which grows in place."""

from typing import Any

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, attention_arguments, cpu

OP = "attention_decode"


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | Any:  # a pair on request
    """Attention of the last T tokens of each sequence on all its keys, which a cache holds.

    The cache may be paged: blocks of keys in any order, which a table names (Kwon et al. 2023).

    Args:
        query: (batch, heads, T, head_dim), float32, bfloat16, float16 or float64. Made for a T of
            1 to 8; any works. Strides are honoured as long as the last dimension is contiguous.
        key_cache: (batch, kv_heads, S, head_dim) or, with block_table,
            (blocks, kv_heads, block_size, head_dim); kv_heads divides heads, and head h reads
            head h // (heads / kv_heads). Where no key was written nothing is read.
        value_cache: the same of values, whose head_dim may be another.
        cache_lengths: (batch,) int32 or int64; the keys of each sequence in the cache, before
            new_key is put there.
        new_key: (batch, kv_heads, n, head_dim) with n ≥ 1, usually T. Written into key_cache, in
            place, at positions cache_lengths[b] and following, and attended to; the caller then
            adds n to cache_lengths.
        new_value: the same for value_cache.
        block_table: (batch, max_blocks) int32 or int64; block_table[b, i] is the block that holds
            keys i · block_size and following of sequence b. Entries that no key needs are ignored.
        scale: by default 1 / √head_dim.
        causal: row i sees key j iff j ≤ i + keys − T, where keys counts the new ones too: the last
            row sees every key.
        window: (left, right): row i sees no key further from i + keys − T; −1 sets no bound.
        alibi_slopes: (heads,) or (batch, heads) float32, or float64 as query;
            slope · |i + keys − T − j| is subtracted from a score (Press et al. 2022).
        softcap: c > 0 turns scaled scores into c · tanh(score / c), before ALiBi.
        return_lse: return the natural logarithm of the softmax's denominator too.

    Returns:
        (batch, heads, T, value's head_dim), laid out in memory as (batch, T, heads, head_dim).
        With return_lse also (batch, heads, T) in float32. A row that sees no key gives zeros and
        −inf. There is no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing was written then. RuntimeError:
        something needs a gradient; or see `backend`, `strict`.
    """
    query, new_key, new_value = _autocast(query, key_cache, new_key, new_value)
    _check_inputs(query, key_cache, value_cache)
    n = _check_new(query, key_cache, value_cache, new_key, new_value)
    cache_lengths, block_table = _check_room(
        query, key_cache, cache_lengths, block_table, new_length=n
    )
    tensors = (
        query, key_cache, value_cache, cache_lengths, new_key, new_value, block_table, alibi_slopes
    )  # fmt: skip
    if torch.is_grad_enabled():
        _check_gradients(tensors)
    scale, left, right = attention_arguments.options(
        OP, query, query.shape[0], scale, causal, None, window, alibi_slopes, softcap
    )

    backend = choose(OP, BACKENDS, tensors)
    if backend == "reference":
        out, lse = reference.attention_decode(
            query, key_cache, value_cache, cache_lengths, new_key=new_key, new_value=new_value,
            block_table=block_table, scale=scale, causal=causal, window=(left, right),
            alibi_slopes=alibi_slopes, softcap=softcap,
        )  # fmt: skip
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return (out, lse) if return_lse else out
    out, lse = BACKENDS[backend].forward(
        cpu.unit_stride(query), key_cache, value_cache, cache_lengths,
        None if new_key is None else cpu.unit_stride(new_key),
        None if new_value is None else cpu.unit_stride(new_value),
        None if block_table is None else cpu.unit_stride(block_table),
        None if alibi_slopes is None else alibi_slopes.contiguous(),
        scale, causal, left, right, softcap,
    )  # fmt: skip
    if new_key is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((key_cache, value_cache))
    return (out, lse) if return_lse else out


def _autocast(query, key_cache, new_key, new_value):
    """Under torch.autocast the caches keep their dtype, and what meets them is cast to it."""
    if arguments.autocast_dtype(query) is None or not isinstance(key_cache, Tensor):
        return query, new_key, new_value
    return tuple(arguments.lower(x, key_cache.dtype) for x in (query, new_key, new_value))


def _check_inputs(query, key_cache, value_cache):
    """Query and caches agree with each other."""
    arguments.floating(OP, "query", query)
    arguments.like(OP, "key_cache", key_cache, "query", query)
    arguments.like(OP, "value_cache", value_cache, "query", query)
    q, k, v = query.shape, key_cache.shape, value_cache.shape
    for name, shape in (("query", q), ("key_cache", k), ("value_cache", v)):
        if len(shape) != 4:
            raise ValueError(
                f"{OP}: {name} has shape {tuple(shape)}; it must be "
                f"(batch, heads, length, head_dim){'' if name == 'query' else ', or in blocks'}."
            )
    if q[3] == 0:
        raise ValueError(f"{OP}: query has head_dim 0; it must be at least 1.")
    if k[3] != q[3]:
        raise ValueError(
            f"{OP}: key_cache has head_dim {k[3]} but query has {q[3]}; they must match."
        )
    if v[0] != k[0] or v[1] != k[1] or v[2] != k[2]:
        raise ValueError(
            f"{OP}: value_cache has shape {tuple(v)} but key_cache has {tuple(k)}; they must match "
            "in all but head_dim."
        )
    if k[1] == 0 or q[1] % k[1] != 0:
        raise ValueError(
            f"{OP}: key_cache has {k[1]} heads but query has {q[1]}; kv_heads must divide heads."
        )


def _check_new(query, key_cache, value_cache, new_key, new_value):
    """The new keys fit the caches, and the caches can be written; returns how many there are."""
    if (new_key is None) != (new_value is None):
        given, missing = ("new_key", "new_value")[:: 1 if new_value is None else -1]
        raise ValueError(f"{OP}: {given} is given but {missing} is None; they come together.")
    if new_key is None:
        return 0
    for name, x, cache in (("new_key", new_key, key_cache), ("new_value", new_value, value_cache)):
        arguments.like(OP, name, x, "query", query)
        expected = (query.shape[0], key_cache.shape[1], cache.shape[3])
        shape = tuple(x.shape)
        if x.dim() != 4 or (shape[0], shape[1], shape[3]) != expected or shape[2] < 1:
            B, heads, head_dim = expected
            raise ValueError(
                f"{OP}: {name} has shape {shape}; it must be ({B}, {heads}, n, {head_dim}) with "
                "n ≥ 1."
            )
        if 0 in cache.stride() and any(
            step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape, strict=True)
        ):
            side = name.removeprefix("new_")
            raise ValueError(
                f"{OP}: {side}_cache has strides {tuple(cache.stride())}; a cache that is written "
                "must have memory of its own for every element."
            )
    if key_cache is value_cache:
        raise ValueError(f"{OP}: value_cache is key_cache; caches that are written must differ.")
    if new_value.shape[2] != new_key.shape[2]:
        raise ValueError(
            f"{OP}: new_value has length {new_value.shape[2]} but new_key has {new_key.shape[2]}; "
            "they must match."
        )
    return new_key.shape[2]


def _check_room(query, key_cache, cache_lengths, block_table, new_length):
    """Lengths and blocks lie within the caches; returns both as int32."""
    B, (blocks, _, block_size, _) = query.shape[0], key_cache.shape
    arguments.integers(OP, "cache_lengths", cache_lengths, B, query)
    if block_table is None:
        room, where = block_size, "key_cache has"
        if blocks != B:
            raise ValueError(
                f"{OP}: key_cache has batch {blocks} but query has {B}; "
                "they must match, or a block_table say which blocks belong to which sequence."
            )
    else:
        arguments.integer_tensor(OP, "block_table", block_table, query)
        if block_table.dim() != 2 or block_table.shape[0] != B:
            raise ValueError(
                f"{OP}: block_table has shape {tuple(block_table.shape)}; "
                f"it must be ({B}, max_blocks), one row per sequence."
            )
        room, where = block_table.shape[1] * block_size, "block_table gives"
    if new_length > room:
        raise ValueError(f"{OP}: new_key has length {new_length}; {where} room for {room} keys.")
    if arguments.readable(cache_lengths):
        lengths = cache_lengths.tolist()
        for b, length in enumerate(lengths):
            if not 0 <= length <= room - new_length:
                new = f" and {new_length} are new" if new_length else ""
                raise ValueError(
                    f"{OP}: cache_lengths[{b}] is {length}{new}; {where} room for {room} keys, "
                    f"so it must lie in [0, {room - new_length}]."
                )
        if block_table is not None and arguments.readable(block_table):
            _check_blocks(block_table, lengths, new_length, block_size, blocks)
    if block_table is not None:
        block_table = block_table.to(torch.int32).contiguous()
    return cache_lengths.to(torch.int32).contiguous(), block_table


def _check_blocks(block_table, lengths, new_length, block_size, blocks):
    """The blocks that hold keys exist. Mostly all of the table's do, which is quickly seen."""
    if block_table.numel() == 0:
        return
    least, most = (x.item() for x in block_table.aminmax())
    if least >= 0 and most < blocks:
        return
    for b, length in enumerate(lengths):
        used = block_table[b, : -(-(length + new_length) // block_size) if block_size else 0]
        for i, block in enumerate(used.tolist()):
            if not 0 <= block < blocks:
                raise ValueError(
                    f"{OP}: block_table[{b}, {i}] is {block}; key_cache has {blocks} blocks, "
                    f"so it must lie in [0, {blocks - 1}]."
                )


def _check_gradients(tensors):
    """Nobody waits for a gradient, which caches that change in place cannot give."""
    names = (
        "query", "key_cache", "value_cache", "cache_lengths", "new_key", "new_value", "block_table",
        "alibi_slopes",
    )  # fmt: skip
    for name, x in zip(names, tensors, strict=True):
        if isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                f"{OP}: {name} requires a gradient, but caches that are written in place have "
                "none; use ft.attention, or call this under torch.no_grad()."
            )


def _cpu_unsupported(tensors):
    for name, cache in (("key_cache", tensors[1]), ("value_cache", tensors[2])):
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            return f"a {name} whose last dimension is not contiguous"
    return cpu.unsupported(tensors)


# forward(query, key_cache, value_cache, cache_lengths, new_key, new_value, block_table,
# alibi_slopes, scale, causal, window_left, window_right, softcap) → out, lse.
BACKENDS = {
    "cpu": Backend(cpu.operator(OP), None, _cpu_unsupported),
    "reference": Backend(reference.attention_decode, None, lambda tensors: None),
}


@cpu.fake(OP)
def _attention_decode_fake(query, key_cache, value_cache, *rest):
    B, H, T, _ = query.shape
    out = query.new_empty(B, T, H, value_cache.shape[3]).transpose(1, 2)
    return out, query.new_empty(B, H, T, dtype=torch.float32)
