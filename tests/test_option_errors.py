"""Every wrong option of attention and argument of relative_attention: a row for each message."""

import re

import pytest
import torch

import fast_transformer as ft

BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
META = torch.zeros(3, device="meta")


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def attention(kv_heads=4, **options):
    q, k = t(2, 4, 5, 8), t(2, kv_heads, 7, 8)
    return lambda: ft.attention(q, k, k, **options)


def varlen(**options):
    q, cu = t(5, 4, 8), torch.tensor([0, 2, 5])
    return lambda: ft.attention_varlen(q, q, q, cu, cu, 3, 3, **options)


def relative(kv_heads=3, **options):
    q, k = t(2, 3, 5, 8), t(2, kv_heads, 7, 8)
    return lambda: ft.relative_attention(q, k, k, **options)


def buckets(x=None, **options):
    x = torch.arange(3) if x is None else x
    return lambda: ft.t5_buckets(x, **({"bidirectional": True} | options))


def segments(**options):
    given = {"segment_key": t(2, 3, 8), "query_segments": torch.zeros(2, 5, dtype=torch.int64)}
    given["key_segments"] = torch.zeros(2, 7, dtype=torch.int32)
    return relative(**(given | options))


OPTIONS = [
    (
        attention(kv_heads=0),
        ValueError,
        "attention: key has 0 heads but query has 4; key's must divide query's.",
    ),
    (
        lambda: ft.attention(t(2, 4, 5, 8), t(2, 4, 7, 8), t(2, 4, 7, 0)),
        ValueError,
        "attention: value has head_dim 0; it must be at least 1.",
    ),
    (
        attention(scale=float("nan")),
        ValueError,
        "attention: scale is nan; it must be a number.",
    ),
    (
        attention(window=3),
        TypeError,
        "attention: window must be two ints, (left, right), got 3.",
    ),
    (
        attention(window=(3,)),
        TypeError,
        "attention: window must be two ints, (left, right), got (3,).",
    ),
    (
        attention(window=None),
        TypeError,
        "attention: window must be two ints, (left, right), got None.",
    ),
    (
        attention(window=(3.0, 1)),
        TypeError,
        "attention: a side of window must be an int, got float.",
    ),
    (
        attention(window=(3, -2)),
        ValueError,
        "attention: window is (3, -2); both must be at least 0, or -1 for unbounded.",
    ),
    (
        attention(window=(2**40, 1)),
        ValueError,
        "attention: a side of window is 1099511627776; it must be between -2**31 and 2**31.",
    ),
    (
        attention(window=(-1, -1), causal_offset=3),
        ValueError,
        "attention: causal_offset is 3 but causal is False, and there is neither a window nor "
        "alibi_slopes.",
    ),
    (
        attention(alibi_slopes=[1.0] * 4),
        TypeError,
        "attention: alibi_slopes must be a tensor, got list.",
    ),
    (
        attention(alibi_slopes=t(4, dtype=F16)),
        TypeError,
        "attention: alibi_slopes has dtype float16; accepted is float32, and float64 where query "
        "is float64.",
    ),
    (
        attention(alibi_slopes=t(4, dtype=F64)),
        TypeError,
        "attention: alibi_slopes has dtype float64; accepted is float32, and float64 where query "
        "is float64.",
    ),
    (
        attention(alibi_slopes=t(1, 4)),
        ValueError,
        "attention: alibi_slopes has shape (1, 4); it must be (heads,) or (batch, heads) = (2, 4).",
    ),
    (
        varlen(alibi_slopes=t(3)),
        ValueError,
        "attention_varlen: alibi_slopes has shape (3,); it must be (heads,) or (batch, heads) = "
        "(2, 4).",
    ),
    (
        attention(alibi_slopes=torch.zeros(4, device="meta")),
        ValueError,
        "attention: alibi_slopes is on device meta but query is on cpu; they must match.",
    ),
    (
        attention(alibi_slopes=t(4).requires_grad_()),
        ValueError,
        "attention: alibi_slopes requires a gradient, and there is none for it; detach it, or make "
        "a bias of it.",
    ),
    (
        attention(softcap="high"),
        TypeError,
        "attention: softcap must be a number, got str.",
    ),
    (attention(softcap=None), TypeError, "attention: softcap must be a number, got NoneType."),
    *(
        (
            attention(softcap=value),
            ValueError,
            f"attention: softcap is {value}; it must be finite and at least 0, which is off.",
        )
        for value in (-1.0, float("nan"), float("inf"))
    ),
]
RELATIVE = [
    (relative(causal=1), TypeError, "relative_attention: causal must be a bool, got int."),
    (
        lambda: ft.relative_attention(t(5, 3, 8), t(5, 3, 8), t(5, 3, 8)),
        ValueError,
        "relative_attention: query has shape (5, 3, 8); it must be (batch, heads, length, "
        "head_dim).",
    ),
    (
        relative(position_bias=t(3, 8)),
        ValueError,
        "relative_attention: position_bias is given, but not position_key.",
    ),
    (
        relative(position_zero=3),
        ValueError,
        "relative_attention: position_zero is given, but not position_key or distance_bias.",
    ),
    (
        relative(query_segments=torch.zeros(2, 5)),
        ValueError,
        "relative_attention: query_segments is given, but not segment_key.",
    ),
    (
        segments(key_segments=None),
        ValueError,
        "relative_attention: segment_key is given, but not key_segments.",
    ),
    (
        relative(position_key=t(12, 3, 8), position_zero=5.0),
        TypeError,
        "relative_attention: position_zero must be an int or None, got float.",
    ),
    (
        relative(position_key=3.0),
        TypeError,
        "relative_attention: position_key must be a tensor, got float.",
    ),
    (
        relative(position_key=t(12, 3, 8, dtype=BF16)),
        TypeError,
        "relative_attention: position_key has dtype bfloat16 but query has float32; they must "
        "match.",
    ),
    (
        relative(position_key=t(12, 3, 4)),
        ValueError,
        "relative_attention: position_key has shape (12, 3, 4); it must be (L, heads, head_dim) = "
        "(L, 3, 8).",
    ),
    (
        segments(segment_key=t(3, 3, 8)),
        ValueError,
        "relative_attention: segment_key has shape (3, 3, 8); it must be (2, heads, head_dim) = "
        "(2, 3, 8).",
    ),
    (
        relative(kv_heads=1, position_key=t(12, 3, 8)),
        ValueError,
        "relative_attention: key has 1 heads but query has 3; with position_key they must match.",
    ),
    (
        segments(kv_heads=1),
        ValueError,
        "relative_attention: key has 1 heads but query has 3; with segment_key they must match.",
    ),
    (
        relative(content_bias=t(8)),
        ValueError,
        "relative_attention: content_bias has shape (8,); it must be (heads, head_dim) = (3, 8).",
    ),
    (
        segments(segment_bias=t(3, 8, dtype=F64)),
        TypeError,
        "relative_attention: segment_bias has dtype float64 but query has float32; they must "
        "match.",
    ),
    (
        relative(distance_bias=[0.0]),
        TypeError,
        "relative_attention: distance_bias must be a tensor, got list.",
    ),
    (
        relative(distance_bias=t(3, 12, dtype=F64)),
        TypeError,
        "relative_attention: distance_bias has dtype float64; accepted are float32 and query's "
        "float32.",
    ),
    (
        relative(distance_bias=t(2, 12)),
        ValueError,
        "relative_attention: distance_bias has shape (2, 12); it must be (heads, L) = (3, L), or "
        "(1, L).",
    ),
    (
        relative(distance_bias=META),
        ValueError,
        "relative_attention: distance_bias is on device meta but query is on cpu; they must match.",
    ),
    (
        relative(position_key=t(12, 3, 8), distance_bias=t(1, 13)),
        ValueError,
        "relative_attention: distance_bias has 13 columns but position_key has 12 rows; they must "
        "match.",
    ),
    (
        relative(position_key=t(11, 3, 8)),
        ValueError,
        "relative_attention: position_key has 11 rows, and row p stands for j - i = p - "
        "position_zero, which is 5; j - i runs from -4 to 6 where a row may see a key, so the rows "
        "1 to 11 must exist.",
    ),
    (
        relative(distance_bias=t(1, 11), position_zero=3),
        ValueError,
        "relative_attention: distance_bias has 11 rows, and row p stands for j - i = p - "
        "position_zero, which is 3; j - i runs from -4 to 6 where a row may see a key, so the rows "
        "-1 to 9 must exist.",
    ),
    (
        relative(position_key=t(4, 3, 8), position_zero=0, window=(3, 5), causal=True),
        ValueError,
        "relative_attention: position_key has 4 rows, and row p stands for j - i = p - "
        "position_zero, which is 0; j - i runs from -1 to 2 where a row may see a key, so the rows "
        "-1 to 2 must exist.",
    ),
    (
        segments(query_segments=[0]),
        TypeError,
        "relative_attention: query_segments must be a tensor, got list.",
    ),
    (
        segments(query_segments=t(2, 5)),
        TypeError,
        "relative_attention: query_segments has dtype float32; accepted are int32 and int64.",
    ),
    (
        segments(key_segments=torch.zeros(2, 5, dtype=torch.int64)),
        ValueError,
        "relative_attention: key_segments has shape (2, 5); it must be (batch, length) = (2, 7).",
    ),
    (
        relative(bias=t(5, 6)),
        ValueError,
        "relative_attention: bias has shape (5, 6); it must broadcast to (batch, heads, T, S) = "
        "(2, 3, 5, 7).",
    ),
    (
        relative(dropout_p=2.0),
        ValueError,
        "relative_attention: dropout_p is 2.0; it must lie in [0, 1].",
    ),
    (buckets(3), TypeError, "t5_buckets: relative_position must be a tensor, got int."),
    (
        buckets(t(3)),
        TypeError,
        "t5_buckets: relative_position has dtype float32; accepted are integers.",
    ),
    (
        buckets(num_buckets=3),
        ValueError,
        "t5_buckets: num_buckets is 3; it must be even and at least 4.",
    ),
    (
        buckets(num_buckets=1, bidirectional=False),
        ValueError,
        "t5_buckets: num_buckets is 1; it must be at least 2.",
    ),
    (
        buckets(max_distance=8),
        ValueError,
        "t5_buckets: max_distance is 8; it must be larger than 8.",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    OPTIONS + RELATIVE,
    ids=[message for *_, message in OPTIONS + RELATIVE],
)
def test_message(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("call", [attention(), varlen(), relative(), segments(), buckets()])
def test_the_defaults_above_are_right(call):
    """Else the rows above would prove nothing."""
    with ft.backend("reference"):
        call()


@pytest.mark.parametrize(
    ("length", "zero", "options"),
    [(11, 4, {}), (7, 4, {"causal": True}), (4, 1, {"window": (3, 5), "causal": True}),
     (1, 0, {"window": (0, 0), "causal_offset": 0}),
     (1, -90, {"window": (0, 0), "causal_offset": 90})],
    ids=str,
)  # fmt: skip
def test_the_rows_asked_for_are_enough(length, zero, options):
    """A table of exactly what causal and window leave; none where they leave nothing."""
    with ft.backend("reference"):
        table, each = t(length, 3, 8), t(3, length)
        relative(position_key=table, distance_bias=each, position_zero=zero, **options)()
