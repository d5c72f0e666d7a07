"""What a call costs before any work is done: microseconds on the smallest inputs.

The budget is 3 µs over F.layer_norm's own without a gradient, and 9 µs with one.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

import fast_transformer as ft

SUITE = "calls"
Pair = tuple[Callable[[], object], Callable[[], object]]  # ours, PyTorch's
BUDGET = {"layer_norm": 3e-6, "layer_norm, gradient": 9e-6}  # over PyTorch's own


def pairs() -> dict[str, Pair]:
    """Every op on inputs of a few elements, without and with a gradient to prepare."""
    x, weight, bias = torch.randn(1, 16), torch.randn(16), torch.randn(16)
    q, k, v = (torch.randn(1, 1, 4, 16) for _ in range(3))
    w1, b1, w2, b2 = torch.randn(16, 16), torch.randn(16), torch.randn(16, 16), torch.randn(16)

    def norm(x):
        return lambda: ft.layer_norm(x, weight, bias), lambda: F.layer_norm(x, (16,), weight, bias)

    def add(x):
        return (
            lambda: ft.add_norm(x, x, weight, bias),
            lambda: F.layer_norm(x + x, (16,), weight, bias),
        )

    def attention(q):
        return (
            lambda: ft.attention(q, k, v),
            lambda: F.scaled_dot_product_attention(q, k, v),
        )

    def linear(x):
        return (
            lambda: ft.linear_act(x, w1, b1, activation="gelu"),
            lambda: F.gelu(F.linear(x, w1, b1)),
        )

    def mlp(x):
        return (
            lambda: ft.mlp(x, w1, b1, w2, b2),
            lambda: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        )

    made = {}
    for name, make, tensor in (
        ("layer_norm", norm, x),
        ("add_norm", add, x),
        ("attention", attention, q),
        ("linear_act", linear, x),
        ("mlp", mlp, x),
    ):
        made[name] = make(tensor)
        made[f"{name}, gradient"] = make(tensor.clone().requires_grad_())
    return made
