"""Every wrong argument of attention_decode is named, before anything is written."""

import re

import pytest
import torch

import fast_transformer as ft


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def i(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def decode(q=None, k=None, v=None, lengths=None, **options):
    q = t(2, 4, 1, 8) if q is None else q
    k = t(2, 2, 7, 8) if k is None else k
    v = t(2, 2, 7, 6) if v is None else v
    lengths = i(7, 2) if lengths is None else lengths
    return lambda: ft.attention_decode(q, k, v, lengths, **options)


def grow(n=1, lengths=(6, 2), k=None, **options):
    new = {"new_key": t(2, 2, n, 8), "new_value": t(2, 2, n, 6)} | options
    return decode(k=k, lengths=i(*lengths), **new)


def paged(table, lengths=(5, 2), **options):
    return decode(
        k=t(6, 2, 2, 8), v=t(6, 2, 2, 6), lengths=i(*lengths), block_table=table, **options
    )


CACHE = t(2, 2, 7, 8)  # for keys and, by mistake, for values
MESSAGES = [
    (decode([1.0]), TypeError, "query must be a tensor, got list."),
    (
        decode(k=t(2, 2, 7, 8, dtype=torch.bfloat16)),
        TypeError,
        "key_cache has dtype bfloat16 but query has float32; they must match.",
    ),
    (
        decode(v=torch.zeros(2, 2, 7, 6, device="meta")),
        ValueError,
        "value_cache is on device meta but query is on cpu; they must match.",
    ),
    (
        decode(t(2, 4, 8)),
        ValueError,
        "query has shape (2, 4, 8); it must be (batch, heads, length, head_dim).",
    ),
    (
        decode(k=t(2, 2, 7)),
        ValueError,
        "key_cache has shape (2, 2, 7); it must be (batch, heads, length, head_dim), or in blocks.",
    ),
    (
        decode(t(2, 4, 1, 0), t(2, 2, 7, 0)),
        ValueError,
        "query has head_dim 0; it must be at least 1.",
    ),
    (
        decode(k=t(2, 2, 7, 4)),
        ValueError,
        "key_cache has head_dim 4 but query has 8; they must match.",
    ),
    (
        decode(v=t(2, 2, 9, 6)),
        ValueError,
        "value_cache has shape (2, 2, 9, 6) but key_cache has (2, 2, 7, 8); they must match in all "
        "but head_dim.",
    ),
    (
        decode(k=t(2, 3, 7, 8), v=t(2, 3, 7, 6)),
        ValueError,
        "key_cache has 3 heads but query has 4; kv_heads must divide heads.",
    ),
    (
        decode(k=t(3, 2, 7, 8), v=t(3, 2, 7, 6)),
        ValueError,
        "key_cache has batch 3 but query has 2; they must match, or a block_table say which "
        "blocks belong to which sequence.",
    ),
    (decode(lengths=[7, 2]), TypeError, "cache_lengths must be a tensor, got list."),
    (
        decode(lengths=t(2)),
        TypeError,
        "cache_lengths has dtype float32; accepted are int32 and int64.",
    ),
    (
        decode(lengths=i(7)),
        ValueError,
        "cache_lengths has shape (1,); it must have (2,), one value per sequence.",
    ),
    (
        decode(lengths=i(7, 8)),
        ValueError,
        "cache_lengths[1] is 8; key_cache has room for 7 keys, so it must lie in [0, 7].",
    ),
    (
        decode(lengths=i(-1, 0)),
        ValueError,
        "cache_lengths[0] is -1; key_cache has room for 7 keys, so it must lie in [0, 7].",
    ),
    (
        grow(2, lengths=(0, 6)),
        ValueError,
        "cache_lengths[1] is 6 and 2 are new; key_cache has room for 7 keys, so it must lie in "
        "[0, 5].",
    ),
    (
        grow(8, lengths=(0, 0)),
        ValueError,
        "new_key has length 8; key_cache has room for 7 keys.",
    ),
    (
        decode(new_key=t(2, 2, 1, 8)),
        ValueError,
        "new_key is given but new_value is None; they come together.",
    ),
    (
        decode(new_value=t(2, 2, 1, 6)),
        ValueError,
        "new_value is given but new_key is None; they come together.",
    ),
    (
        grow(new_key=t(2, 4, 1, 8)),
        ValueError,
        "new_key has shape (2, 4, 1, 8); it must be (2, 2, n, 8) with n ≥ 1.",
    ),
    (
        grow(new_value=t(2, 2, 1, 8)),
        ValueError,
        "new_value has shape (2, 2, 1, 8); it must be (2, 2, n, 6) with n ≥ 1.",
    ),
    (
        grow(k=CACHE, v=CACHE, new_value=t(2, 2, 1, 8)),
        ValueError,
        "value_cache is key_cache; caches that are written must differ.",
    ),
    (grow(0), ValueError, "new_key has shape (2, 2, 0, 8); it must be (2, 2, n, 8) with n ≥ 1."),
    (
        grow(new_value=t(2, 2, 3, 6)),
        ValueError,
        "new_value has length 3 but new_key has 1; they must match.",
    ),
    (
        grow(k=t(2, 1, 7, 8).expand(2, 2, 7, 8)),
        ValueError,
        "key_cache has strides (56, 0, 8, 1); a cache that is written must have memory of its own "
        "for every element.",
    ),
    (paged([[0, 1, 2]]), TypeError, "block_table must be a tensor, got list."),
    (paged(t(2, 3)), TypeError, "block_table has dtype float32; accepted are int32 and int64."),
    (
        paged(i(0, 1, 2)),
        ValueError,
        "block_table has shape (3,); it must be (2, max_blocks), one row per sequence.",
    ),
    (
        paged(i([0, 1], [2, 3])),
        ValueError,
        "cache_lengths[0] is 5; block_table gives room for 4 keys, so it must lie in [0, 4].",
    ),
    (
        paged(i([0, 1, 2], [6, 7, 8])),
        ValueError,
        "block_table[1, 0] is 6; key_cache has 6 blocks, so it must lie in [0, 5].",
    ),
    (
        paged(i([0, 1, -1], [3, 7, 8])),
        ValueError,
        "block_table[0, 2] is -1; key_cache has 6 blocks, so it must lie in [0, 5].",
    ),
    (decode(causal=1), TypeError, "causal must be a bool, got int."),
    (decode(window=3), TypeError, "window must be two ints, (left, right), got 3."),
    (decode(window=(3, 0.5)), TypeError, "a side of window must be an int, got float."),
    (
        decode(window=(-2, 0)),
        ValueError,
        "window is (-2, 0); both must be at least 0, or -1 for unbounded.",
    ),
    (decode(scale="large"), TypeError, "scale must be a number, got str."),
    (decode(softcap=None), TypeError, "softcap must be a number, got NoneType."),
    (
        decode(softcap=-1.0),
        ValueError,
        "softcap is -1.0; it must be finite and at least 0, which is off.",
    ),
    (decode(alibi_slopes=0.5), TypeError, "alibi_slopes must be a tensor, got float."),
    (
        decode(alibi_slopes=t(4, dtype=torch.bfloat16)),
        TypeError,
        "alibi_slopes has dtype bfloat16; accepted is float32, and float64 where query is float64.",
    ),
    (
        decode(alibi_slopes=t(2)),
        ValueError,
        "alibi_slopes has shape (2,); it must be (heads,) or (batch, heads) = (2, 4).",
    ),
    (
        decode(t(2, 4, 1, 8).requires_grad_()),
        RuntimeError,
        "query requires a gradient, but caches that are written in place have none; use "
        "ft.attention, or call this under torch.no_grad().",
    ),
    (
        decode(alibi_slopes=t(4).requires_grad_()),
        RuntimeError,
        "alibi_slopes requires a gradient, but caches that are written in place have none; use "
        "ft.attention, or call this under torch.no_grad().",
    ),
    (
        grow(new_value=t(2, 2, 1, 6).requires_grad_()),
        RuntimeError,
        "new_value requires a gradient, but caches that are written in place have none; use "
        "ft.attention, or call this under torch.no_grad().",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), MESSAGES, ids=[m for *_, m in MESSAGES])
def test_message(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'attention_decode: {message}')}$"):
        call()


@pytest.mark.parametrize(
    "call", [decode(), grow(), paged(i([0, 1, 2], [5, 7, -8])), paged(i([0, 1, 2], [5, 3, 4]))]
)
def test_the_defaults_above_are_right(call):
    """Else the rows above would prove nothing; what no key needs in a table may be any number."""
    call()


@pytest.mark.parametrize("lengths", [(6, 7), (-1, 0)])
def test_nothing_is_written_then(backend, lengths):
    k = torch.zeros(2, 2, 7, 8)
    with pytest.raises(ValueError, match="cache_lengths"):
        grow(1, lengths, k=k, new_key=torch.ones(2, 2, 1, 8))()
    assert (k == 0).all()


def test_gradients_that_nobody_waits_for(backend):
    call = decode(t(2, 4, 1, 8).requires_grad_())
    with torch.no_grad():
        assert not call().requires_grad


@pytest.mark.parametrize(
    ("lengths", "table", "message"),
    [
        ([3, 8], None, r"cache_lengths\[1\] is 8; it must lie in \[0, 6\]"),
        ([-2, 0], None, r"cache_lengths\[0\] is -2; it must lie in \[0, 6\]"),
        ([0, 5], [[0, 1, 9], [0, 1, 2]], r"cache_lengths\[1\] is 5; it must lie in \[0, 2\]"),
        ([2, 0], [[0, 1, 2], [-3, 9, 9]], r"block_table\[1, 0\] is -3; it must lie in \[0, 5\]"),
    ],
    ids=str,
)
def test_the_operator_checks_again(kernels, lengths, table, message):
    """What the function cannot read, as when it is traced."""
    shape = (2, 2, 7) if table is None else (6, 2, 1)
    k, v = torch.zeros(*shape, 8), torch.zeros(*shape, 6)
    table = None if table is None else i(*table, dtype=torch.int32)
    new = torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 6)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fast_transformer.attention_decode(
            t(2, 4, 1, 8), k, v, i(*lengths, dtype=torch.int32), *new, table, None,
            1.0, True, -1, -1, 0.0,
        )  # fmt: skip
    assert (k == 0).all() and (v == 0).all()
