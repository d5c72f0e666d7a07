"""The gated perceptron: SwiGLU, GeGLU and their like."""

from torch.nn.functional import linear

from fast_transformer.reference.mlp import ACTIVATIONS


def gated_mlp(
    x, w_gate, w_up, w_down, *, activation="silu", b_gate=None, b_up=None, b_down=None
):  # fmt: skip
    """(activation(x w_gateᵀ + b_gate) ∘ (x w_upᵀ + b_up)) w_downᵀ + b_down, Shazeer 2020, eq. 6.

    x: (..., C); w_gate, w_up: (F, C); w_down: (N, F); b_gate, b_up: (F,); b_down: (N,).
    """
    gate = ACTIVATIONS[activation](linear(x, w_gate, b_gate))
    return linear(gate * linear(x, w_up, b_up), w_down, b_down)
