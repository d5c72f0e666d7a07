"""The gated perceptron of LLaMA and its kin as a module."""

import torch
from torch import Tensor, nn

from fast_transformer import ops
from fast_transformer.nn.plain import is_linear, linear
from fast_transformer.reference.mlp import ACTIVATIONS


class GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x)) ∘ up_proj(x)), Shazeer 2020: SwiGLU and its variants.

    Args:
        embed_dim: channels of input and output.
        hidden_dim: channels between them.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU).
        bias: whether the linear layers have one.
        recompute: keep nothing of the hidden layer for backward, which makes it again.
        device: of the parameters.
        dtype: of the parameters.

    The state_dict has the keys of transformers' LlamaMLP: gate_proj.weight, up_proj.weight and
    down_proj.weight, all initialised as nn.Linear does.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        accepted = [name for name in ACTIVATIONS if name is not None]
        if activation not in accepted:
            raise ValueError(
                f"GatedMLP: activation is {activation!r}; accepted are {', '.join(accepted)}."
            )
        self.activation = activation
        self.recompute = recompute
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., embed_dim) → the same."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not (is_linear(gate) and is_linear(up) and is_linear(down)):
            gated = ACTIVATIONS[self.activation](linear(gate, input))
            return linear(down, gated * linear(up, input))
        return ops.gated_mlp(
            input, gate.weight, up.weight, down.weight, activation=self.activation,
            b_gate=gate.bias, b_up=up.bias, b_down=down.bias, recompute=self.recompute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return what the printed module says beside its children."""
        return f"activation={self.activation!r}"
