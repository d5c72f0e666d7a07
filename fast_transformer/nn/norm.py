"""torch.nn.LayerNorm on the fused op."""

import math

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
        shape = tuple(self.normalized_shape)
        if tuple(input.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"LayerNorm: input has shape {tuple(input.shape)}; it must end in {shape}."
            )
        if len(shape) == 1:
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        rows = input.reshape(*input.shape[: -len(shape)], math.prod(shape))
        weight, bias = (None if p is None else p.reshape(-1) for p in (self.weight, self.bias))
        return ops.layer_norm(rows, weight, bias, self.eps).view(input.shape)
