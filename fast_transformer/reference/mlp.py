"""A linear layer with an activation, and the Transformer's two-layer perceptron."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from fast_transformer.reference.philox import dropout

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
    "silu": silu,
}


def linear_act(x, weight, bias=None, *, activation=None):
    """activation(x weightᵀ + bias). x: (..., K); weight: (N, K); bias: (N,)."""
    return ACTIVATIONS[activation](linear(x, weight, bias))


def mlp(x, w1, b1, w2, b2, *, activation="gelu", dropout_p=0.0, seed=None):
    """dropout(activation(x w1ᵀ + b1)) w2ᵀ + b2, Vaswani et al. 2017, eq. 2.

    x: (..., C); w1: (F, C); b1: (F,); w2: (N, F); b2: (N,). Dropout counts the rows of x in order.
    """
    hidden = linear_act(x, w1, b1, activation=activation)
    if dropout_p > 0.0:
        wide = hidden.to(torch.promote_types(x.dtype, torch.float32))
        hidden = dropout(wide, dropout_p, seed).to(x.dtype)
    return linear(hidden, w2, b2)
