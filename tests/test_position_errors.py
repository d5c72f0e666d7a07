"""Wrong arguments of rotary and embedding_norm: one row here for each message."""

import re

import pytest
import torch

import fast_transformer as ft

BF16, F64 = torch.bfloat16, torch.float64


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def i(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


META = torch.zeros(5, 4, device="meta")


def rotary(**given):
    inputs = {"query": t(2, 3, 5, 8), "key": t(2, 1, 5, 8), "cos": t(5, 4), "sin": t(5, 4)}
    return lambda: ft.rotary(**inputs | given)


def embedding(**given):
    inputs = {"input_ids": i(0, 3, 2), "word": t(4, 8), "position": t(3, 8)}
    inputs |= {"token_type": t(2, 8), "weight": t(8), "bias": t(8)}
    return lambda: ft.embedding_norm(**inputs | given)


ROTARY = [
    (rotary(query=[1.0]), TypeError, "query must be a tensor, got list."),
    (
        rotary(query=t(2, 3, 5, 8, dtype=torch.int32)),
        TypeError,
        "query has dtype int32; accepted are float32, bfloat16, float16 and float64.",
    ),
    (
        rotary(query=t(5, 8)),
        ValueError,
        "query has shape (5, 8); it must be (batch, heads, length, head_dim) or (tokens, heads, "
        "head_dim).",
    ),
    (
        rotary(key=t(2, 1, 5, 8, dtype=BF16)),
        TypeError,
        "key has dtype bfloat16 but query has float32; they must match.",
    ),
    (
        rotary(key=t(2, 1, 6, 8)),
        ValueError,
        "key has shape (2, 1, 6, 8) but query has (2, 3, 5, 8); they must match but for the heads.",
    ),
    (
        rotary(key=t(5, 1, 8)),
        ValueError,
        "key has shape (5, 1, 8) but query has (2, 3, 5, 8); they must match but for the heads.",
    ),
    (rotary(interleaved=1), TypeError, "interleaved must be a bool, got int."),
    (rotary(sin=None), TypeError, "sin must be a tensor, got NoneType."),
    (
        rotary(cos=t(5, 4, dtype=BF16)),
        TypeError,
        "cos has dtype bfloat16; accepted are float32 and query's float32.",
    ),
    (
        rotary(cos=META),
        ValueError,
        "cos is on device meta but query is on cpu; they must match.",
    ),
    (
        rotary(sin=t(5, 4).requires_grad_()),
        ValueError,
        "sin requires a gradient, and there is none for it; detach it.",
    ),
    (
        rotary(cos=t(6, 4)),
        ValueError,
        "cos has shape (6, 4); query of (2, 3, 5, 8) asks for (5, R/2) or (2, 5, R/2), one row for "
        "each position.",
    ),
    (
        rotary(cos=t(3, 5, 4)),
        ValueError,
        "cos has shape (3, 5, 4); query of (2, 3, 5, 8) asks for (5, R/2) or (2, 5, R/2), one row "
        "for each position.",
    ),
    (
        rotary(query=t(7, 3, 8), key=None),
        ValueError,
        "cos has shape (5, 4); query of (7, 3, 8) asks for (7, R/2), one row for each position.",
    ),
    (
        rotary(cos=t(5, 8), sin=t(5, 8)),
        ValueError,
        "cos has 8 columns, one for each pair; query's head_dim 8 has 4 pairs. Where cos repeats "
        "itself, pass its first half.",
    ),
    (
        rotary(sin=t(5, 3)),
        ValueError,
        "sin is (5, 3) of float32 but cos is (5, 4) of float32; they must match.",
    ),
]

EMBEDDING = [
    (embedding(word="word"), TypeError, "word must be a tensor, got str."),
    (
        embedding(input_ids=t(3)),
        TypeError,
        "input_ids has dtype float32; accepted are int32 and int64.",
    ),
    (
        embedding(input_ids=torch.tensor(1)),
        ValueError,
        "input_ids has no dimension; it must have shape (..., T).",
    ),
    (embedding(word=t(4)), ValueError, "word has shape (4,); it must be (V, C)."),
    (
        embedding(position=t(3, 8, dtype=BF16)),
        TypeError,
        "position has dtype bfloat16 but word has float32; they must match.",
    ),
    (
        embedding(token_type=t(2, 7)),
        ValueError,
        "token_type has shape (2, 7); word's 8 channels ask for (rows, 8).",
    ),
    (embedding(weight=t(7)), ValueError, "weight has shape (7,); word asks for (8,)."),
    (embedding(bias=1.0), TypeError, "bias must be a tensor, got float."),
    (
        embedding(bias=t(8, dtype=F64)),
        TypeError,
        "bias has dtype float64; accepted are float32 and word's float32.",
    ),
    (embedding(eps=-1.0), ValueError, "eps is -1.0; it must not be negative."),
    (embedding(eps="small"), TypeError, "eps must be a number, got str."),
    (embedding(dropout_p=1.5), ValueError, "dropout_p is 1.5; it must lie in [0, 1]."),
    (
        embedding(token_type=None, token_type_ids=i(0, 0, 0)),
        ValueError,
        "token_type_ids are given, but token_type is None.",
    ),
    (
        embedding(position_ids=i(0, 0)),
        ValueError,
        "position_ids has shape (2,); it must broadcast to input_ids' (3,).",
    ),
    (
        embedding(position_ids=t(3)),
        TypeError,
        "position_ids has dtype float32; accepted are int32 and int64.",
    ),
    (
        embedding(input_ids=i(0, 1, 2, 3)),
        ValueError,
        "input_ids has length 4, but position has 3 rows; pass position_ids, or fewer tokens.",
    ),
    (embedding(padding_idx=0.5), TypeError, "padding_idx must be an int or None, got float."),
    (
        embedding(padding_idx=4),
        ValueError,
        "padding_idx is 4; word has 4 rows, so it must lie in [0, 4).",
    ),
    (
        embedding(position=None, position_padding_idx=0),
        ValueError,
        "position_padding_idx is 0, but position is None.",
    ),
    (
        embedding(input_ids=i(0, 4, 1)),
        IndexError,
        "input_ids holds 4; word has 4 rows, so ids must lie in [0, 4).",
    ),
    (
        embedding(position_ids=i(0, 1, -1, dtype=torch.int32)),
        IndexError,
        "position_ids holds -1; position has 3 rows, so ids must lie in [0, 3).",
    ),
    (
        embedding(token_type_ids=i(2)),
        IndexError,
        "token_type_ids holds 2; token_type has 2 rows, so ids must lie in [0, 2).",
    ),
    (
        embedding(word=t(4, 8).requires_grad_(), input_ids=i(0, 4, 1)),
        IndexError,
        "input_ids holds 4; word has 4 rows, so ids must lie in [0, 4).",
    ),
]
ROWS = [("rotary", *row) for row in ROTARY] + [("embedding_norm", *row) for row in EMBEDDING]


@pytest.mark.parametrize(("op", "call", "error", "message"), ROWS)
def test_message(backend, op, call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == f"{op}: {message}"


def forward(*given):
    return torch.ops.fast_transformer.embedding_norm_fwd(*given, *(None,) * 3, 1e-5, 0.0)


SECOND_LINE = [
    (lambda: forward(i(0, 4), t(4, 8), *(None,) * 4), "input_ids holds 4, but word has 4 rows"),
    (lambda: forward(i(-1), t(4, 8), *(None,) * 4), "input_ids holds -1, but word has 4 rows"),
    (lambda: forward(i(0, 1), t(4, 8), t(1, 8), *(None,) * 3), "1 rows for 2 positions"),
    (lambda: forward(i(0), t(4, 8), t(1, 7), *(None,) * 3), "position must be (rows, 8)"),
    (
        lambda: torch.ops.fast_transformer.rotary(t(1, 1, 3, 8), None, t(2, 4), t(2, 4), 0, 0),
        "cos must be (3, 4) or (1, 3, 4)",
    ),
    (
        lambda: torch.ops.fast_transformer.rotary(t(1, 1, 3, 8), None, t(3, 5), t(3, 5), 0, 0),
        "cos has 5 columns, head_dim is 8",
    ),
]


@pytest.mark.parametrize(("call", "message"), SECOND_LINE)
def test_operators_check_again(kernels, call, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()


def test_there_is_no_second_derivative(cpu):
    word = torch.randn(4, 8, requires_grad=True)
    out = ft.embedding_norm(i(0, 3, 2), word)
    (first,) = torch.autograd.grad(out.square().sum(), word, create_graph=True)
    with pytest.raises(RuntimeError, match="embedding_norm: its fused kernels have no second"):
        first.sum().backward()
