"""The two-layer perceptron of a Transformer as a module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fast_transformer.nn.plain import feed_forward

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class MLP(nn.Module):
    """linear2(dropout(activation(linear1(x)))), Vaswani et al. 2017, eq. 2.

    Args:
        in_features: channels of the input.
        hidden_features: channels between the two layers.
        out_features: channels of the output; by default in_features.
        activation: "gelu" (by the error function), "gelu_tanh", "relu" or "silu".
        dropout: probability of dropping a hidden element in training.
        bias: whether the linear layers have one.
        device: of the parameters.
        dtype: of the parameters.

    The state_dict has the keys of nn.TransformerEncoderLayer's own: linear1.weight, linear1.bias,
    linear2.weight, linear2.bias, all initialised as nn.Linear does.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"MLP: activation is {activation!r}; accepted are {', '.join(_ACTIVATIONS)}."
            )
        out_features = in_features if out_features is None else out_features
        self.linear1 = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        return feed_forward(self.linear1, self.linear2, self.dropout, self.activation, input)
