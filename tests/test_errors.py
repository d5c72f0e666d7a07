"""Every wrong argument is named before memory is touched: one row here for each message."""

import re

import pytest
import torch

import fast_transformer as ft

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def t(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def i(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def attention(q=None, k=None, v=None, **options):
    q = t(2, 3, 5, 8) if q is None else q
    k = t(2, 3, 7, 8) if k is None else k
    v = t(2, 3, 7, 8) if v is None else v
    return lambda: ft.attention(q, k, v, **options)


def varlen(q=None, k=None, cu_q=None, cu_k=None, max_q=3, max_k=4, **options):
    q = t(5, 3, 8) if q is None else q
    k = t(6, 3, 8) if k is None else k
    cu_q = i(0, 2, 5) if cu_q is None else cu_q
    cu_k = i(0, 4, 6) if cu_k is None else cu_k
    return lambda: ft.attention_varlen(q, k, k, cu_q, cu_k, max_q, max_k, **options)


def linear_act(x=None, weight=None, bias=None, **options):
    x, weight = (t(3, 8) if x is None else x), (t(6, 8) if weight is None else weight)
    return lambda: ft.linear_act(x, weight, bias, **options)


def mlp(w1=None, b1=None, w2=None, b2=None, **options):
    w1, w2 = (t(6, 8) if w1 is None else w1), (t(4, 6) if w2 is None else w2)
    return lambda: ft.mlp(t(3, 8), w1, b1, w2, b2, **options)


META = torch.zeros(2, 3, 7, 8, device="meta")
ATTENTION = [
    (attention([1.0]), TypeError, "attention: query must be a tensor, got list."),
    (attention(k="key"), TypeError, "attention: key must be a tensor, got str."),
    (
        attention(t(2, 3, 5, 8, dtype=torch.int64)),
        TypeError,
        "attention: query has dtype int64; accepted are float32, bfloat16, float16 and float64.",
    ),
    (
        attention(k=t(2, 3, 7, 8, dtype=BF16)),
        TypeError,
        "attention: key has dtype bfloat16 but query has float32; they must match.",
    ),
    (
        attention(v=META),
        ValueError,
        "attention: value is on device meta but query is on cpu; they must match.",
    ),
    (
        attention(t(3, 5, 8)),
        ValueError,
        "attention: query has shape (3, 5, 8); it must be (batch, heads, length, head_dim).",
    ),
    (
        attention(t(2, 3, 5, 0), t(2, 3, 7, 0), t(2, 3, 7, 0)),
        ValueError,
        "attention: query has head_dim 0; it must be at least 1.",
    ),
    (
        attention(k=t(2, 3, 7, 4)),
        ValueError,
        "attention: key has head_dim 4 but query has 8; they must match.",
    ),
    (
        attention(k=t(2, 2, 7, 8), v=t(2, 2, 7, 8)),
        ValueError,
        "attention: key has 2 heads but query has 3; key's must divide query's.",
    ),
    (
        attention(v=t(2, 3, 6, 8)),
        ValueError,
        "attention: value has shape (2, 3, 6, 8) but key has (2, 3, 7, 8); they must match but for "
        "head_dim.",
    ),
    (
        attention(k=t(1, 3, 7, 8), v=t(1, 3, 7, 8)),
        ValueError,
        "attention: key has batch 1 but query has 2; they must match.",
    ),
    (
        attention(scale="large"),
        TypeError,
        "attention: scale must be a number, got str.",
    ),
    (attention(causal=1), TypeError, "attention: causal must be a bool, got int."),
    (
        attention(causal=True, causal_offset=0.5),
        TypeError,
        "attention: causal_offset must be an int or None, got float.",
    ),
    (
        attention(causal_offset=2),
        ValueError,
        "attention: causal_offset is 2 but causal is False, and there is neither a window nor "
        "alibi_slopes.",
    ),
    (
        attention(causal=True, causal_offset=2**63 - 1),
        ValueError,
        "attention: causal_offset is 9223372036854775807; it must be between -2**31 and 2**31.",
    ),
    (
        attention(key_lengths=[7, 7]),
        TypeError,
        "attention: key_lengths must be a tensor, got list.",
    ),
    (
        attention(key_lengths=t(2)),
        TypeError,
        "attention: key_lengths has dtype float32; accepted are int32 and int64.",
    ),
    (
        attention(key_starts=i(1, 2, 3)),
        ValueError,
        "attention: key_starts has shape (3,); it must have (2,), one value per sequence.",
    ),
    (
        attention(key_lengths=i(7, 8)),
        ValueError,
        "attention: key_lengths[1] is 8; key has length 7, so it must lie in [0, 7].",
    ),
    (
        attention(key_starts=i(-1, 0, dtype=torch.int32)),
        ValueError,
        "attention: key_starts[0] is -1; key has length 7, so it must lie in [0, 7].",
    ),
    (
        attention(key_lengths=torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        "attention: key_lengths is on device meta but query is on cpu; they must match.",
    ),
    (attention(bias=0.0), TypeError, "attention: bias must be a tensor, got float."),
    (
        attention(bias=t(5, 7, dtype=F64)),
        TypeError,
        "attention: bias has dtype float64; accepted are bool, float32 and query's float32.",
    ),
    (
        attention(bias=t(1, 2, 3, 5, 7)),
        ValueError,
        "attention: bias has shape (1, 2, 3, 5, 7); it must broadcast to (batch, heads, T, S) = "
        "(2, 3, 5, 7).",
    ),
    (
        attention(bias=t(5, 6)),
        ValueError,
        "attention: bias has shape (5, 6); it must broadcast to (batch, heads, T, S) = "
        "(2, 3, 5, 7).",
    ),
    (
        attention(bias=torch.zeros(5, 7, device="meta")),
        ValueError,
        "attention: bias is on device meta but query is on cpu; they must match.",
    ),
    (
        attention(dropout_p=1.5),
        ValueError,
        "attention: dropout_p is 1.5; it must lie in [0, 1].",
    ),
    (
        attention(dropout_p=float("nan")),
        ValueError,
        "attention: dropout_p is nan; it must lie in [0, 1].",
    ),
    (
        attention(dropout_p=None),
        TypeError,
        "attention: dropout_p must be a number, got NoneType.",
    ),
    (
        attention(dropout_p=0.1, seed=3),
        TypeError,
        "attention: seed must be a 0-d int64 tensor, got int.",
    ),
    (
        attention(dropout_p=0.1, seed=i(3)),
        TypeError,
        "attention: seed must be a 0-d int64 tensor, got a tensor of shape (1,) and dtype int64.",
    ),
    (
        attention(dropout_p=0.1, seed=torch.zeros((), dtype=torch.int64, device="meta")),
        ValueError,
        "attention: seed is on device meta; the inputs are on cpu.",
    ),
]
VARLEN = [
    (
        varlen(t(1, 5, 3, 8)),
        ValueError,
        "attention_varlen: query has shape (1, 5, 3, 8); it must be (tokens, heads, head_dim).",
    ),
    (
        varlen(max_q=None),
        TypeError,
        "attention_varlen: max_seqlen_q must be a number, got NoneType.",
    ),
    (
        varlen(cu_q=(0, 2, 5)),
        TypeError,
        "attention_varlen: cu_seqlens_q must be a tensor, got tuple.",
    ),
    (
        varlen(cu_q=t(3)),
        TypeError,
        "attention_varlen: cu_seqlens_q has dtype float32; accepted are int32 and int64.",
    ),
    (
        varlen(cu_k=t(3, 1, dtype=torch.int32)),
        ValueError,
        "attention_varlen: cu_seqlens_k has shape (3, 1); it must have one dimension.",
    ),
    (
        varlen(cu_q=i()),
        ValueError,
        "attention_varlen: cu_seqlens_q is empty; it must hold batch + 1 offsets.",
    ),
    (
        varlen(cu_q=i(1, 2, 5)),
        ValueError,
        "attention_varlen: cu_seqlens_q[0] is 1; it must be 0.",
    ),
    (
        varlen(cu_q=i(0, 3, 2, 5), max_q=5),
        ValueError,
        "attention_varlen: cu_seqlens_q falls from 3 to 2 at 2; it must rise.",
    ),
    (
        varlen(max_k=3),
        ValueError,
        "attention_varlen: sequence 0 of cu_seqlens_k has length 4 but max_seqlen_k is 3.",
    ),
    (
        varlen(cu_k=i(0, 4, 8)),
        ValueError,
        "attention_varlen: cu_seqlens_k ends at 8; it must end at 6, the tokens packed.",
    ),
    (
        varlen(cu_k=i(0, 2, 4, 6)),
        ValueError,
        "attention_varlen: cu_seqlens_k holds 4 offsets but cu_seqlens_q holds 3; they must match.",
    ),
    (
        varlen(bias=t(3, 3, 4)[:2]),
        ValueError,
        "attention_varlen: bias has shape (2, 3, 4); it must broadcast to (batch, heads, T, S) = "
        "(2, 3, 3, 4).",
    ),
]
LINEAR = [
    (linear_act([1.0]), TypeError, "linear_act: x must be a tensor, got list."),
    (
        linear_act(t()),
        ValueError,
        "linear_act: x has no dimension; its last one holds the input features.",
    ),
    (
        linear_act(weight=t(6, 8, dtype=F64)),
        TypeError,
        "linear_act: weight has dtype float64 but x has float32; they must match.",
    ),
    (
        linear_act(weight=t(8, 6)),
        ValueError,
        "linear_act: weight has shape (8, 6); x has 8 features, so it must be (out, 8).",
    ),
    (
        linear_act(bias=t(8)),
        ValueError,
        "linear_act: bias has shape (8,); weight gives 6 features, so it must be (6,).",
    ),
    (
        linear_act(activation="swish"),
        ValueError,
        "linear_act: activation is 'swish'; accepted are None, 'gelu', 'gelu_tanh', 'relu' and "
        "'silu'.",
    ),
    (
        mlp(w2=t(4, 5)),
        ValueError,
        "mlp: w2 has shape (4, 5); w1 gives 6, so it must be (out, 6).",
    ),
    (mlp(b2=t(6)), ValueError, "mlp: b2 has shape (6,); w2 gives 4 features, so it must be (4,)."),
    (mlp(b1=t(6, dtype=BF16)), TypeError, "mlp: b1 has dtype bfloat16 but x has float32; they "
     "must match."),
    (mlp(dropout_p="half"), TypeError, "mlp: dropout_p must be a number, got str."),
    (
        mlp(activation=["gelu"]),
        ValueError,
        "mlp: activation is ['gelu']; accepted are None, 'gelu', 'gelu_tanh', 'relu' and 'silu'.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"),
    ATTENTION + VARLEN + LINEAR,
    ids=[message for *_, message in ATTENTION + VARLEN + LINEAR],
)
def test_message(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("call", [attention(), varlen(), linear_act()])
def test_the_defaults_above_are_right(call):
    """Else the rows above would prove nothing."""
    call()
