"""torch.nn's cross-entropy losses on the fused ops."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_transformer import ops
from fast_transformer.backends import Backend, choose

# What the fused ops have no word for runs in torch, and a record of calls says why.
_IN_TORCH = {
    "cpu": Backend(F.cross_entropy, None, lambda reason: reason),
    "reference": Backend(F.cross_entropy, None, lambda reason: None),
}


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss: the same arguments and results.

    Class weights and probabilities as targets are left to torch's own loss, as are integer targets
    of other dtypes than int64.
    """

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Answer why `module`, a torch.nn.CrossEntropyLoss, must stay one; None if not."""
        return None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (V,), (N, V) or (N, V, d1, …) at classes (), (N,) or (N, d1, …).

        Raises:
            ValueError, TypeError: an argument is not as above, or a class out of range.
        """
        reason = _reason(self.weight, target)
        if reason is not None:
            choose("cross_entropy", _IN_TORCH, reason)
            return super().forward(input, target)
        logits = input.movedim(1, -1) if input.dim() > 2 else input
        loss = ops.cross_entropy(
            logits, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )  # fmt: skip
        return loss if _autocast(input) else loss.to(input.dtype)


class _LinearLoss(nn.Module):
    """What torch.nn.LinearCrossEntropyLoss keeps, for versions of torch without it."""

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: torch.dtype | None = None, reduction: str = "mean", weight: Tensor | None = None,
        ignore_index: int | None = None, label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.reduction = num_classes, reduction
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.out_features: tuple[int, ...] = ()


_TorchLinearLoss: Any = getattr(nn, "LinearCrossEntropyLoss", _LinearLoss)


class LinearCrossEntropy(_TorchLinearLoss):  # type: ignore[misc]
    """torch.nn.LinearCrossEntropyLoss (torch 2.13): a vocabulary projection and its loss in one.

    Args:
        in_features: channels of the input.
        num_classes: size of the vocabulary.
        z_loss: what the square of logsumexp weighs; torch has no such argument.
        options: torch's own arguments: bias (False by default), reduction, weight (of classes),
            ignore_index, label_smoothing, out_features, device, dtype, options.

    The state_dict has torch's keys, linear.weight and linear.bias. Class weights, out_features and
    probabilities as targets are left to torch, which forms the logits; z_loss is not for them.
    torch's `options`, its own way to save memory, is kept for those alone.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, z_loss: float = 0.0, **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        self.z_loss = z_loss

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Answer why `module`, a torch.nn.LinearCrossEntropyLoss, must stay one; None if not."""
        return None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` (..., in_features) at the classes `target` (...).

        Raises:
            ValueError, TypeError: an argument is not as above, or a class out of range.
        """
        reason = "out_features" if self.out_features else _reason(self.weight, target)
        z_loss = getattr(self, "z_loss", 0.0)  # torch's own module may have become this one
        if reason is not None:
            if z_loss:
                raise ValueError(
                    f"LinearCrossEntropy: z_loss is {z_loss} with {reason}; it must be 0."
                )
            choose("linear_cross_entropy", _IN_TORCH, reason)
            return self._in_torch(input, target)
        loss = ops.linear_cross_entropy(
            input, self.linear.weight, target, bias=self.linear.bias,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing, z_loss=z_loss, reduction=self.reduction,
        )  # fmt: skip
        return loss if _autocast(input) else loss.to(input.dtype)

    def _in_torch(self, input: Tensor, target: Tensor) -> Tensor:
        if _TorchLinearLoss is not _LinearLoss:
            loss: Tensor = super().forward(input, target)
            return loss
        return F.cross_entropy(
            self.linear(input), target, self.weight, reduction=self.reduction,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


def _reason(weight: Tensor | None, target: Tensor) -> str | None:
    """Why the fused ops cannot take this, or None."""
    if weight is not None:
        return "class weights"
    if isinstance(target, Tensor) and target.is_floating_point():
        return "probabilities as targets"
    if isinstance(target, Tensor) and target.dtype is not torch.int64:
        return f"targets of {str(target.dtype).removeprefix('torch.')}"
    return None


def _autocast(x: Tensor) -> bool:
    """Whether torch's own loss would answer in float32 whatever the dtype of `x`."""
    return torch.is_autocast_enabled(x.device.type)
