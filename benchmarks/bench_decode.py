"""attention_decode against SDPA, with its grouped heads and with repeated ones, and the formula."""

import torch
from torch.nn import functional as F

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import attention_decode
from fast_transformer.testing import DecodeCase, cases

SUITE = "decode"
CASES = cases("decode", "bench")


def contest(case: DecodeCase, dtype: str) -> Contest:
    """Ours and PyTorch's on the same cache, whose pages PyTorch puts in order in each call."""
    inputs = case.inputs(DTYPES[dtype]) | {"return_lse": False}
    T, S = case.shape[3], case.shape[4]
    dense = {"query": inputs["query"], "mask": None, "length": S}
    dense |= {name: inputs[f"{name}_cache"] for name in ("key", "value")}
    dense["table"] = inputs["block_table"] if case.block_size is not None else None
    if T > 1:
        dense["mask"] = torch.arange(S) <= torch.arange(T)[:, None] + S - T
    peers = {name: Entry(on_cache(f), dense, case.wrt) for name, f in PEERS.items()}
    # every key and value is read once
    key, value = (cached(dense[name], S, dense["table"]) for name in ("key", "value"))
    ours = Entry(attention_decode, inputs, case.wrt)
    moved = (key.nbytes + value.nbytes, 0)
    return Contest(case, dtype, ours, peers, "formula", bytes=moved, reads_alone=True)


def cached(cache, length, table):
    """The keys or values that are there: (batch, kv_heads, length, head_dim)."""
    if table is not None:
        cache = cache[table].transpose(1, 2).flatten(2, 3)
    return cache[:, :, :length]


def on_cache(function):
    """`function` of keys and values, on a cache."""

    def call(query, key, value, length, table, mask):
        return function(query, cached(key, length, table), cached(value, length, table), mask)

    return call


def grouped(query, key, value, mask):
    """SDPA, which is told of the groups."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def repeated(query, key, value, mask):
    """SDPA on keys and values that are copied for every head of the group."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def formula(query, key, value, mask):
    """Two products and a softmax, where the heads of a group are rows of one product."""
    shape, kv_heads = query.shape, key.shape[1]
    scores = query.reshape(shape[0], kv_heads, -1, shape[3]) @ key.mT * shape[3] ** -0.5
    if mask is not None:
        scores = scores.unflatten(2, (-1, shape[2])).masked_fill(~mask, -torch.inf).flatten(2, 3)
    return (scores.softmax(-1) @ value).reshape(shape)


PEERS = {"sdpa": grouped, "repeated": repeated, "formula": formula}
