"""Every wrong argument of a norm is named before memory is touched: a row for each message."""

import re

import pytest
import torch

import fast_transformer as ft

BF16 = torch.bfloat16


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def layer_norm(x=None, weight=None, bias=None, eps=1e-5):
    return lambda: ft.layer_norm(t(3, 8) if x is None else x, weight, bias, eps)


def rms_norm(x=None, weight=None, eps=None):
    return lambda: ft.rms_norm(t(3, 8) if x is None else x, weight, eps)


def add_norm(x=None, residual=None, **options):
    x, residual = (t(3, 8) if y is None else y for y in (x, residual))
    return lambda: ft.add_norm(x, residual, **options)


NORM = [
    (layer_norm(3.0), TypeError, "layer_norm: x must be a tensor, got float."),
    (
        layer_norm(t(3, 8).bool()),
        TypeError,
        "layer_norm: x has dtype bool; accepted are float32, bfloat16, float16 and float64.",
    ),
    (layer_norm(t()), ValueError, "layer_norm: x has no dimension; it must have shape (..., C)."),
    (layer_norm(weight=1.0), TypeError, "layer_norm: weight must be a tensor, got float."),
    (
        layer_norm(t(3, 8, dtype=BF16), bias=t(8, dtype=torch.float16)),
        TypeError,
        "layer_norm: bias has dtype float16; accepted are float32 and x's bfloat16.",
    ),
    (
        layer_norm(weight=t(7)),
        ValueError,
        "layer_norm: weight has shape (7,); x's last dimension asks for (8,).",
    ),
    (
        layer_norm(weight=torch.zeros(8, device="meta")),
        ValueError,
        "layer_norm: weight is on device meta but x is on cpu; they must match.",
    ),
    (layer_norm(eps="small"), TypeError, "layer_norm: eps must be a number, got str."),
    (layer_norm(eps=-1.0), ValueError, "layer_norm: eps is -1.0; it must not be negative."),
    (
        add_norm(norm="batch_norm"),
        ValueError,
        "add_norm: norm is 'batch_norm'; accepted are 'layer_norm' and 'rms_norm'.",
    ),
    (
        add_norm(norm=["rms_norm"]),
        ValueError,
        "add_norm: norm is ['rms_norm']; accepted are 'layer_norm' and 'rms_norm'.",
    ),
    (rms_norm(3.0), TypeError, "rms_norm: x must be a tensor, got float."),
    (rms_norm(t(), t(3)), ValueError, "rms_norm: x has no dimension; it must have shape (..., C)."),
    (
        rms_norm(weight=t(8, dtype=BF16)),
        TypeError,
        "rms_norm: weight has dtype bfloat16; accepted are float32 and x's float32.",
    ),
    (rms_norm(eps="small"), TypeError, "rms_norm: eps must be a number, got str."),
    (rms_norm(eps=-1.0), ValueError, "rms_norm: eps is -1.0; it must not be negative."),
    (add_norm(3.0), TypeError, "add_norm: x must be a tensor, got float."),
    (add_norm(3.0, norm="rms_norm"), TypeError, "add_norm: x must be a tensor, got float."),
    (
        add_norm(norm="rms_norm", bias=t(8)),
        ValueError,
        "add_norm: bias is given but norm is 'rms_norm', which has none.",
    ),
    (
        add_norm(residual=t(3, 8, dtype=BF16)),
        TypeError,
        "add_norm: residual has dtype bfloat16 but x has float32; they must match.",
    ),
    (
        add_norm(residual=t(1, 8)),
        ValueError,
        "add_norm: residual has shape (1, 8) but x has (3, 8); they must match.",
    ),
    (
        add_norm(dropout_p=-0.1),
        ValueError,
        "add_norm: dropout_p is -0.1; it must lie in [0, 1].",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), NORM, ids=[message for *_, message in NORM])
def test_message(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("call", [layer_norm(), rms_norm(), add_norm(), add_norm(norm="rms_norm")])
def test_the_defaults_above_are_right(call):
    """Else the rows above would prove nothing."""
    call()
