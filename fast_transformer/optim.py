"""Optimizers: torch.optim's, with the step of a whole group in one pass over its memory."""

import math
from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fast_transformer import reference
from fast_transformer.ops import adamw


class _Taken(NamedTuple):
    """A group that the kernels took whole: its parameters with a gradient, and what it asked."""

    params: list[Tensor]
    flags: tuple[bool, ...]

    def goes_on(self, params: list[Tensor], flags: tuple[bool, ...]) -> bool:
        """Tell whether they are the same."""
        same = len(params) == len(self.params) and all(map(is_, params, self.params))
        return same and flags == self.flags


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter 2019), one pass over memory, with clipping inside.

    Args:
        params: parameters, named parameters or groups of them.
        lr: learning rate, a number or a tensor of one element.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the averaged square.
        weight_decay: taken off the parameters, times lr.
        amsgrad: divide by the largest averaged square so far.
        maximize: go up the gradient.
        foreach, capturable, differentiable, fused: how torch.optim.AdamW updates what the kernels
            leave to it.
        max_grad_norm: clip the L2 norm of all gradients together, as
            torch.nn.utils.clip_grad_norm_ does, but leave them as they are. The norm before
            clipping is then `grad_norm`, a 0-d tensor; infinity measures it and clips nothing.

    float32, bfloat16 and float16 on the CPU run on the kernels, computed in float32 and rounded
    once; everything else runs in torch.optim's own code, parameter by parameter. See
    `fast_transformer.backend` and `strict`. `state_dict` is that of torch.optim.AdamW.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """

    # GradScaler hands its scale over and skips no step itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.max_grad_norm = _checked(max_grad_norm)
        self.grad_norm: Tensor | None = None
        self._forget()
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_grad_norm": self.max_grad_norm, "grad_norm": self.grad_norm}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        closure: computes the loss again, which is returned. Under torch.compile the update runs
        eagerly, behind a graph break.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _eagerly(self)
        else:
            self._update()
        return loss

    def _update(self) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            parts = self._parts()
            try:
                scale = self._scale(parts)
            except RuntimeError:
                if not self._taken:
                    raise
                self._forget()
                parts = self._parts()
                scale = self._scale(parts)
            for part in parts:
                try:
                    adamw.step(part, scale)
                except RuntimeError:
                    if part.backend != "cpu" or not self._taken:
                        raise
                    self._forget()
                    for fresh in self._parts_of(part.group):
                        adamw.step(fresh, scale)

    def _scale(self, parts: list[adamw.Part]) -> float | Tensor:
        """What to multiply gradients by: undo the scale of the loss, and clip."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        if self.max_grad_norm is None or not parts:
            return scale
        norm = adamw.grad_norm(parts) * scale
        self.grad_norm = (
            norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float32)
        )
        if self.max_grad_norm == math.inf:
            return scale
        return reference.clip_coefficient(norm, self.max_grad_norm) * scale

    def _parts(self) -> list[adamw.Part]:
        """Who updates what: of every group its tensors, in the hands of one backend or of two."""
        return [part for group in self.param_groups for part in self._parts_of(group)]

    def _parts_of(self, group: adamw.Group) -> list[adamw.Part]:
        """Divide a group, or do as at the last step.

        Looking at every tensor takes longer than updating a small one. So a group that the kernels
        took whole is theirs until its parameters or flags are others; that tensors changed under
        the same name they find out before they touch anything, and raise.
        """
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return []
        flags = (group["capturable"], group["differentiable"], group["decoupled_weight_decay"])
        states: list[dict[str, Tensor]] = [self.state[p] for p in params]
        taken = self._taken.get(id(group))
        if taken is not None and taken.goes_on(params, flags) and all(states):
            tensors = adamw.Tensors(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
                [state["step"] for state in states],
            )
            return [adamw.part(tensors, group)]
        tensors = adamw.Tensors([], [], [], [], [], [])
        self._init_group(group, *tensors)  # type: ignore[no-untyped-call]
        parts = adamw.parts(tensors, group)
        if len(parts) == 1 and parts[0].backend == "cpu":
            self._taken[id(group)] = _Taken(params, flags)
        return parts

    def _forget(self) -> None:
        self._taken: dict[int, _Taken] = {}


def _checked(max_grad_norm: float | None) -> float | None:
    if max_grad_norm is None:
        return None
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, (int, float)):
        raise TypeError(
            f"AdamW: max_grad_norm must be a number or None, got {type(max_grad_norm).__name__}."
        )
    if math.isnan(max_grad_norm) or max_grad_norm < 0:
        raise ValueError(f"AdamW: max_grad_norm is {max_grad_norm}; it must be at least 0.")
    return float(max_grad_norm)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _eagerly(optimizer: AdamW) -> None:
    optimizer._update()
