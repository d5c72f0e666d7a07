"""What fast_transformer.optim is made of: AdamW on many tensors, and the norm of gradients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import cpu

OP = "adamw"
Group = Mapping[str, Any]  # a param_group of torch.optim.AdamW


class Tensors(NamedTuple):
    """Parameters with their gradients and their state, lists of one length.

    max_exp_avg_sqs is empty without amsgrad.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def of(self, indices: Sequence[int]) -> "Tensors":
        """Those parameters alone."""
        return Tensors(*([x[i] for i in indices] if x else [] for x in self))


class Part(NamedTuple):
    """Parameters of one group that one backend updates."""

    backend: str
    tensors: Tensors
    group: Group


def parts(tensors: Tensors, group: Group) -> list[Part]:
    """Divide a group: what the kernels take, and what is left to the reference.

    Raises RuntimeError: see `backend`, `strict`.
    """
    reasons = [unsupported(tensors.of([i]), group) for i in range(len(tensors.params))]
    taken = [i for i, reason in enumerate(reasons) if reason is None]
    for i in _overlapping([tensors.of([i]) for i in taken]):
        reasons[taken[i]] = "memory that two parameters share"
    taken = [i for i, reason in enumerate(reasons) if reason is None]
    left = [i for i, reason in enumerate(reasons) if reason is not None]
    found = []
    for indices in filter(None, (taken, left)):
        reason = ", ".join(dict.fromkeys(r for i in indices if (r := reasons[i]) is not None))
        found.append(part(tensors.of(indices), group, reason or None))
    return found


def part(tensors: Tensors, group: Group, reason: str | None = None) -> Part:
    """Choose who updates these; reason: why the kernels cannot."""
    return Part(choose(OP, BACKENDS, reason), tensors, group)


def unsupported(tensors: Tensors, group: Group) -> str | None:
    """Answer why the CPU kernels cannot update this one parameter; None when they can."""
    for flag in ("differentiable", "capturable"):
        if group[flag]:
            return f"{flag}=True"
    if not group["decoupled_weight_decay"]:
        return "decoupled_weight_decay=False"
    param, *others = own = [x[0] for x in tensors[:-1] if x]
    (step,) = tensors.steps
    if any(x.is_sparse or x.layout is not torch.strided for x in own):
        return "sparse tensors"
    if (reason := cpu.unsupported((*own, step))) is not None:
        return reason
    if any(x.dtype != param.dtype for x in others):
        return "state of another dtype than the parameter"
    if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
        return "a step that is no float32 or float64 number"
    if any(x.is_inference() for x in (*own, step)):
        return "inference tensors"
    if not _is_dense(param) or any(not _same_layout(x, param) for x in others):
        return "a parameter that is not dense, or a gradient or state laid out in another way"
    return None


def _same_layout(x: Tensor, y: Tensor) -> bool:
    """Tell whether every element has the same place in both."""
    if x.shape != y.shape:
        return False
    return all(a == b or n == 1 for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True))


def _is_dense(x: Tensor) -> bool:
    """Tell whether the elements fill a stretch of memory, each with a place of its own."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def _overlapping(own: Sequence[Tensors]) -> set[int]:
    """Return which of these share memory that is written with one before it."""
    spans = sorted(
        (x[0].data_ptr(), x[0].data_ptr() + x[0].nbytes, i)
        for i, tensors in enumerate(own)
        for x in (*tensors[:1], *tensors[2:])
        if x and x[0].nbytes
    )
    found, end, last = set(), 0, 0
    for begin, stop, i in spans:
        if begin < end:
            found.add(max(i, last))
        if stop > end:
            end, last = stop, i
    return found


def step(part: Part, scale: float | Tensor) -> None:
    """Update parameters and state in place, as if the gradients were multiplied by `scale`."""
    BACKENDS[part.backend].forward(*part.tensors, part.group, scale)


def grad_norm(found: Sequence[Part]) -> float | Tensor:
    """Return the L2 norm of all gradients: a number where the kernels have a part in it."""
    grads = [g for part in found if part.backend == "cpu" for g in part.tensors.grads]
    others = [g for part in found if part.backend != "cpu" for g in part.tensors.grads]
    if not grads:
        return reference.grad_norm(others)
    squares = _squares(grads).item()
    if others:
        squares += float(reference.grad_norm(others)) ** 2
    return math.sqrt(squares)


def _cpu(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, group, scale):
    beta1, beta2 = group["betas"]
    _adamw(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, float(group["lr"]),
        float(beta1), float(beta2), float(group["weight_decay"]), float(group["eps"]),
        -float(scale) if group["maximize"] else float(scale),
    )  # fmt: skip
    for changed in (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps):
        torch.autograd.graph.increment_version(changed)


_adamw, _squares = cpu.operator("adamw_"), cpu.operator("sum_of_squares")
BACKENDS = {
    "cpu": Backend(_cpu, None, lambda reason: reason or cpu.missing()),
    "reference": Backend(reference.adamw_, None, lambda reason: None),
}


@cpu.fake("adamw_")
def _adamw_fake(*arguments):
    return None


@cpu.fake("sum_of_squares")
def _sum_of_squares_fake(tensors):
    return torch.empty((), dtype=torch.float64)
