"""AdamW in plain PyTorch: what a step and a clipped gradient mean, for every tensor there is."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """√Σ g² over all elements of all gradients."""
    return torch.nn.utils.get_total_norm(grads)


def clip_coefficient(norm: float | Tensor, max_norm: float) -> float | Tensor:
    """By what torch.nn.utils.clip_grad_norm_ multiplies gradients: min(1, max_norm / norm)."""
    coefficient = max_norm / (norm + 1e-6)
    # in this order a NaN stays one
    return coefficient.clamp(max=1.0) if isinstance(coefficient, Tensor) else min(coefficient, 1.0)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: Mapping[str, Any],
    scale: float | Tensor,
) -> None:
    """One step of Loshchilov and Hutter 2019, algorithm 2, on scale · grads, by torch.optim.

    group: a param_group of torch.optim.AdamW; its foreach and fused say by which of torch's ways.
    """
    if isinstance(scale, Tensor):
        grads = [g * scale.to(g.device) for g in grads]
    elif scale != 1.0:
        grads = [g * scale for g in grads]
    names = (
        "amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable",
        "differentiable", "fused", "decoupled_weight_decay",
    )  # fmt: skip
    beta1, beta2 = group["betas"]
    adam(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs),
        list(steps), beta1=beta1, beta2=beta2, has_complex=any(map(torch.is_complex, params)),
        **{name: group[name] for name in names},
    )  # fmt: skip
