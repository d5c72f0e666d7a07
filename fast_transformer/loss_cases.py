"""The cases of cross_entropy and linear_cross_entropy in the table of testing.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fast_transformer.attention_cases import generator


@dataclass(frozen=True)
class LossCase:
    """One call of cross_entropy (rows, V), or of linear_cross_entropy (rows, C, V).

    ignored: the part of the rows whose target is ignore_index; they hold NaN.
    """

    name: str
    use: str
    shape: tuple[int, ...]
    biased: bool = False
    ignored: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    family: str = "loss"

    @property
    def op(self) -> str:
        """The public function."""
        return "cross_entropy" if len(self.shape) == 2 else "linear_cross_entropy"

    @property
    def kind(self) -> str:
        """The public function, and what it does beside the plain loss."""
        return f"{self.op}, some ignored" if self.ignored > 0 else self.op

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        if self.op == "cross_entropy":
            return ("logits",)
        return ("hidden", "weight", "bias") if self.biased else ("hidden", "weight")

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name; weights are scaled so that logits are about normal."""
        random = generator(self.name)
        M, *_, V = self.shape
        target = torch.randint(0, V, (M,), generator=random)
        ignored = torch.randperm(M, generator=random)[: round(M * self.ignored)]
        target[ignored] = -100
        made: dict[str, Any] = {"target": target, "reduction": self.reduction}
        if self.op == "cross_entropy":
            made["logits"] = (3 * torch.randn(M, V, generator=random)).to(dtype)
            made["logits"][ignored] = float("nan")
        else:
            C = self.shape[1]
            made["hidden"] = torch.randn(M, C, generator=random).to(dtype)
            made["hidden"][ignored] = float("nan")
            made["weight"] = (torch.randn(V, C, generator=random) * max(C, 1) ** -0.5).to(dtype)
            if self.biased:
                made["bias"] = torch.randn(V, generator=random).to(dtype)
        if self.label_smoothing > 0:
            made["label_smoothing"] = self.label_smoothing
        if self.z_loss > 0:
            made["z_loss"] = self.z_loss
        return made


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smooth": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "z": {"z_loss": 1e-2},
    "ignored": {"ignored": 0.4},
    "all": {"ignored": 0.4, "label_smoothing": 0.2, "z_loss": 1e-3, "reduction": "none"},
}


def _tests() -> Iterable[LossCase]:
    for M, V in ((1, 1), (1, 63), (3, 65), (65, 127), (7, 1000), (197, 333), (3, 4099), (2, 33333)):
        yield LossCase(f"ce-{M}x{V}", "test", (M, V))
    shapes: list[tuple[int, ...]] = [
        (1, 1, 1), (3, 5, 7), (1, 40, 197), (16, 63, 65), (17, 65, 127), (65, 127, 77),
        # several blocks of classes, several sums over channels, many rows
        (33, 70, 1601), (5, 24, 25000), (20, 900, 500), (450, 24, 401),
    ]  # fmt: skip
    for shape in shapes:
        name = "linear-ce-" + "x".join(map(str, shape))
        yield LossCase(name, "test", shape)
        yield LossCase(f"{name}-biased", "test", shape, biased=True)
    for name, options in OPTIONS.items():
        yield LossCase(f"ce-{name}", "test", (37, 1030), **options)
        yield LossCase(f"linear-ce-{name}", "test", (37, 40, 1030), biased=True, **options)


def _benches() -> Iterable[LossCase]:
    shapes: list[tuple[int, ...]] = [
        (1, 1000), (7, 4099), (1, 50257), (64, 32000), (256, 50257), (33, 128256), (512, 8191),
        (4096, 1000), (1024, 30522),
    ]  # fmt: skip
    for shape in shapes:
        yield LossCase("ce-" + "x".join(map(str, shape)), "bench", shape)
    yield LossCase("ce-ignored-256x50257", "bench", (256, 50257), ignored=0.85)
    yield LossCase("ce-smooth-256x50257", "bench", (256, 50257), label_smoothing=0.1)
    for M, C, V in (
        (1, 768, 50257), (77, 768, 50257), (512, 384, 30522), (512, 768, 50257), (333, 1024, 32000),
        (2048, 768, 50257),
    ):  # fmt: skip
        yield LossCase(f"linear-ce-{M}x{C}x{V}", "bench", (M, C, V))
    yield LossCase("linear-ce-ignored-512x768x30522", "bench", (512, 768, 30522), ignored=0.85)


LOSS_CASES = (*_tests(), *_benches())
