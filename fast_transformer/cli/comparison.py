"""What the demo finds out of a stock model and its accelerated copy; it prints nothing."""

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer.backends import record
from fast_transformer.cli.encoder import Batch, hidden
from fast_transformer.timing import Timing

STOCK, SWAPPED = "transformers", "fast_transformer"
ERROR_ALLOWED = 1e-5  # of fp32 unit vectors against the stock ones; both are off by some 1e-7

Calls = dict[str, dict[str, int]]  # op -> backend -> how often


@dataclass(frozen=True)
class Agreement:
    """How near embeddings are to those of the stock fp32 model.

    neighbours: of how many sentences the nearest other sentence is the same one.
    """

    max_error: float
    min_cosine: float
    neighbours: int
    sentences: int


def agreement(vectors: Tensor, stock: Tensor) -> Agreement:
    """Compare unit vectors (sentences, channels) with those of the stock fp32 model."""
    error = (vectors - stock).abs().max().item()
    cosine = F.cosine_similarity(vectors.double(), stock.double()).min().item()
    same = int((nearest(vectors) == nearest(stock)).sum())
    return Agreement(error, cosine, same, len(stock))


def nearest(vectors: Tensor) -> Tensor:
    """The index of the nearest other vector, for each."""
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)


def accelerated(model: nn.Module) -> nn.Module:
    """An accelerated copy: the demo needs both at once, where a user swaps in place."""
    model = copy.deepcopy(model)
    ft.accelerate(model)
    return model


def restores(model: nn.Module, batch: Batch) -> bool:
    """Whether accelerate and restore leave a model with the output it had, to the last bit."""
    before = hidden(model, batch)
    swapped = accelerated(model)
    hidden(swapped, batch)
    ft.restore(swapped)
    return torch.equal(before, hidden(swapped, batch))


def calls(model: nn.Module, batch: Batch) -> Calls:
    """Calls of each op in one forward pass, by the backend that ran them."""
    with record() as recorded:
        hidden(model, batch)
    found: Calls = {}
    for (op, backend), count in Counter((call.op, call.backend) for call in recorded).items():
        found.setdefault(op, {})[backend] = count
    return found


@dataclass(frozen=True)
class Answer:
    """The sentence that comes nearest to a query, and its cosine."""

    query: str
    side: str
    sentence: str
    cosine: float


@dataclass(frozen=True)
class Speed:
    """One batch through both models, side by side.

    fill: the part of the batch that is text. tokens: its length, padding included. flops: what
    the text needs. core_peak: FLOP/s that a core's registers allow, or None where not known.
    """

    dtype: str
    batch: str
    fill: float
    sentences: int
    tokens: int
    flops: float
    core_peak: float | None
    stock: Timing
    ours: Timing

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by the medians."""
        return self.stock.median / self.ours.median

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        found: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for side in ("stock", "ours"):
            timing = found[side]
            found[side] = {
                "sentences_per_second": self.sentences / timing.median,
                "flops_per_second": self.flops / timing.median,
                "median_seconds": timing.median,
                "spread": timing.spread,
                "seconds": timing.seconds,
            }
        return found | {"ratio": self.ratio}


@dataclass(frozen=True)
class Findings:
    """Everything that the demo shows."""

    conditions: dict[str, Any]
    runs: int
    agreements: dict[tuple[str, str], Agreement]  # (side, dtype)
    answers: list[Answer]
    speeds: list[Speed]
    calls: dict[str, Calls]
    explanation: str
    restored: bool

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "conditions": self.conditions,
            "runs": self.runs,
            "agreement": {" ".join(key): asdict(a) for key, a in self.agreements.items()},
            "answers": [asdict(answer) for answer in self.answers],
            "speed": [speed.figures() for speed in self.speeds],
            "calls": self.calls,
            "explain": self.explanation,
            "restored": self.restored,
        }

    def failures(self) -> list[str]:
        """What does not hold, in words."""
        wrong = []
        error = self.agreements[SWAPPED, "fp32"].max_error
        if not error <= ERROR_ALLOWED:
            wrong.append(f"fp32 embeddings are off by {error:.1e}")
        for dtype, ops in self.calls.items():
            if not ops:
                wrong.append(f"the {dtype} model called no op of ours")
            fallen = [op for op, backends in ops.items() if "reference" in backends]
            if fallen:
                wrong.append(f"{', '.join(fallen)} in {dtype} fell back to plain PyTorch")
        if not self.restored:
            wrong.append("ft.restore did not bring the stock output back")
        return wrong
