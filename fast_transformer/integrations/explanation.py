"""`explain`: what was swapped, what stayed and why, and which op ran on which backend."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fast_transformer.backends import record
from fast_transformer.integrations import registry
from fast_transformer.integrations.costs import costs as costs_of
from fast_transformer.integrations.swap import candidates
from fast_transformer.nn.packed_weights import packed_parameters


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str` makes a report of it.

    Attributes:
        model: the class of the model.
        swapped: (name, class) of every module that runs fused.
        stayed: (name, class, reason) of every stock module that the table knows.
        costs: (name, what it costs) of what keeps a swapped module from fusing all it could.
        calls: (op, backend) -> how often; None when `explain` was given no inputs.
        reasons: (op, backend, reason) why a backend that comes earlier did not run the op.
        packed_bytes: of the weights that are packed beside the parameters.
        packed_error: the largest error of one in int8, relative to the largest weight of its row.
    """

    model: str
    swapped: tuple[tuple[str, str], ...]
    stayed: tuple[tuple[str, str, str], ...]
    costs: tuple[tuple[str, str], ...]
    calls: dict[tuple[str, str], int] | None = None
    reasons: tuple[tuple[str, str, str], ...] = field(default=())
    packed_bytes: int = 0
    packed_error: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} modules swapped, {len(self.stayed)} stayed"]
        lines += _section("swapped", [(name, kind) for kind, name in _grouped(self.swapped)])
        stayed = (((kind, reason), name) for name, kind, reason in self.stayed)
        lines += _section(
            "stayed", [(name, f"{kind}: {reason}") for (kind, reason), name in _names(stayed)]
        )
        lines += _section(
            "costs", [(name, what) for what, name in _names((w, n) for n, w in self.costs)]
        )
        if self.packed_bytes:
            error = f", int8 errs by up to {self.packed_error:.2%} of a row's largest weight"
            size = f"{self.packed_bytes / 2**20:.1f} MB beside the parameters"
            lines.append(f"packed weights: {size}{error if self.packed_error else ''}")
        if self.calls is not None:
            rows = [(op, f"{backend} × {n}") for (op, backend), n in sorted(self.calls.items())]
            lines += _section("calls in one forward pass", rows or [("no op of ours", "")])
            lines += _section(
                "why not elsewhere", [(f"{op}, {b}", reason) for op, b, reason in self.reasons]
            )
        return "\n".join(lines)


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Tell what `accelerate` swapped in `model`, what stayed and why, and what ran where.

    With inputs, `model(*inputs, **kwargs)` runs once, without gradients; the state of the random
    number generators and train or eval mode stay as they were.

    Returns:
        An `Explanation`; print it.

    Raises:
        TypeError: `model` is no module. What the model itself raises passes through.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}.")
    swapped = [(n, m) for n, m in model.named_modules() if registry.ours(m)]
    costs = []
    for name, module in swapped:
        for child, what in costs_of(module):
            costs.append((".".join(filter(None, (name, child))), what))
    calls, reasons = None, {}
    packed = [kept.held for _, _, kept in packed_parameters(model) if kept.held is not None]
    if inputs or kwargs:
        with torch.random.fork_rng(), torch.no_grad(), record() as recorded:
            model(*inputs, **kwargs)
        calls = dict(Counter((call.op, call.backend) for call in recorded))
        reasons = {
            (call.op, backend, reason): None
            for call in recorded
            for backend, reason in call.reasons.items()
        }
    return Explanation(
        model=type(model).__name__,
        swapped=tuple((name, type(module).__name__) for name, module in swapped),
        stayed=tuple(
            (c.name, type(c.module).__name__, c.reason or "accelerate has not been called since")
            for c in candidates(model)
        ),
        costs=tuple(costs),
        calls=calls,
        reasons=tuple(reasons),
        packed_bytes=sum(weight.nbytes for weight in packed),
        packed_error=max((weight.error for weight in packed), default=0.0),
    )


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    width = max(len(left) for left, _ in rows)
    return [title, *(f"  {left:{width}}  {right}".rstrip() for left, right in rows)]


def _grouped(swapped: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return _names((kind, name) for name, kind in swapped)


def _names(rows: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """(what, name)… → (what, names) with "layer.0", "layer.1", "layer.2" told as "layer.0-2"."""
    groups: dict[tuple[Any, str], list[str]] = {}
    for what, name in rows:  # names that differ in their first number alone belong together
        groups.setdefault((what, re.sub(r"\d+", "#", name, count=1)), []).append(name)
    told = []
    for (what, pattern), names in groups.items():
        numbers = [int(re.findall(r"\d+", name)[0]) for name in names if "#" in pattern]
        told.append((what, pattern.replace("#", _ranges(numbers), 1) or "the model"))
    return told


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
