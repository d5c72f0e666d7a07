"""torch.nn.LayerNorm and RMSNorm on the fused ops."""

import math

import torch
from torch import Tensor, nn

from fast_transformer import ops


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm: the same arguments, parameters and results.

    Input and output: (..., *normalized_shape), float32, bfloat16, float16 or float64. Statistics
    are taken in float32.
    """

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Answer why `module`, a torch.nn.LayerNorm, must stay one; None if not."""
        return None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last len(normalized_shape) dimensions of `input`.

        Raises:
            ValueError: `input` does not end in normalized_shape.
        """
        rows, weight, bias = _rows(self, input, self.weight, self.bias)
        return ops.layer_norm(rows, weight, bias, self.eps).view(input.shape)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm: the same arguments, parameters and results.

    Input and output: (..., *normalized_shape), float32, bfloat16, float16 or float64. The mean
    square and the product with weight are taken in float32.
    """

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Answer why `module`, a torch.nn.RMSNorm, must stay one; None if not."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last len(normalized_shape) dimensions of `x`.

        A weight of another dtype than float32 or that of `x` is PyTorch's business.

        Raises:
            ValueError: `x` does not end in normalized_shape.
        """
        if self.weight is not None and self.weight.dtype not in (x.dtype, torch.float32):
            return super().forward(x)
        rows, weight, _ = _rows(self, x, self.weight, None)
        return ops.rms_norm(rows, weight, self.eps).view(x.shape)


def _rows(
    module: nn.LayerNorm | nn.RMSNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`x` and the parameters with normalized_shape as one dimension."""
    shape = tuple(module.normalized_shape)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{type(module).__name__}: input has shape {tuple(x.shape)}; it must end in {shape}."
        )
    if len(shape) > 1:
        x = x.reshape(*x.shape[: -len(shape)], math.prod(shape))
        weight, bias = (None if p is None else p.reshape(-1) for p in (weight, bias))
    return x, weight, bias
