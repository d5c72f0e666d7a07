"""One contest: an op of ours and its peers on the same work, timed side by side, judged first.

The answer is checked against float64 before anything is timed; a wrong one gets no figures. The
physical limit stands beside every figure: what the processor can multiply or move in that time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fast_transformer import backends, testing
from fast_transformer.timing import Timing, interleaved

Function = Callable[..., Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """One way to do the work: a function, its arguments, and which of them have a gradient."""

    function: Function
    inputs: Mapping[str, Any]
    wrt: tuple[str, ...]

    def forward(self) -> Callable[[], object]:
        """The work without a gradient."""

        def call():
            with torch.inference_mode():
                return self.function(**self.inputs)

        return call

    def backward(self) -> Callable[[], object]:
        """The gradient alone, of a forward pass that was done before."""
        leaves = {name: self.inputs[name].detach().requires_grad_() for name in self.wrt}
        out = self.function(**{**self.inputs, **leaves})
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)


@dataclass(frozen=True)
class Contest:
    """A case of `testing.CASES` at one dtype, with ours and what PyTorch offers for it.

    flops, bytes: of the forward and of the backward pass; whichever the op is bound by is given.
    reads_alone: the bytes are read, and next to nothing is written.
    """

    case: testing.Case
    dtype: str
    ours: Entry
    peers: Mapping[str, Entry]
    flops: tuple[float, float] | None = None
    bytes: tuple[float, float] | None = None
    reads_alone: bool = False


@dataclass(frozen=True)
class Result:
    """What one pass ("forward" or "backward") of a contest gave."""

    suite: str
    case: str
    dtype: str
    step: str
    timings: Mapping[str, Timing] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    error: float = 0.0
    plain_error: float = 0.0
    backend: str = ""
    wrong: str | None = None
    reads_alone: bool = False

    @property
    def best(self) -> str:
        """The fastest peer."""
        return min(set(self.timings) - {"ours"}, key=lambda name: self.timings[name].median)

    @property
    def ratio(self) -> float:
        """How many times faster ours is than the fastest peer."""
        return self.timings[self.best].median / self.timings["ours"].median

    @property
    def behind(self) -> bool:
        """Whether a peer is faster, by more than the cost of a call where that is all there is."""
        best, ours = self.timings[self.best].median, self.timings["ours"].median
        return ours > best and not (best < 20e-6 and ours - best <= 3e-6)

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        known = {name: getattr(self, name) for name in self.__dataclass_fields__}
        known["timings"] = {
            name: {"median_seconds": t.median, "spread": t.spread, "seconds": t.seconds}
            for name, t in self.timings.items()
        }
        return known if self.wrong else known | {"best_peer": self.best, "ratio": self.ratio}


def judge(case: testing.Case, dtype: torch.dtype) -> tuple[str, dict[str, tuple[float, float]]]:
    """Hold the op to the project's rule of error; AssertionError where it fails.

    Returns the backend that ran and, for each output and gradient, the largest error of ours and
    of plain PyTorch at this dtype, both against float64 and relative to the largest value.
    """
    inputs = case.inputs(dtype)
    with backends.record() as calls:
        got = testing.evaluate(case.op, inputs, case.wrt)
    with backends.backend("reference"):
        plain = testing.evaluate(case.op, inputs, case.wrt)
        exact = testing.evaluate(case.op, testing.in_float64(inputs), case.wrt)
    testing.assert_close_to_reference(got, plain, exact)
    errors = {}
    for name, truth in exact.items():
        finite = truth.isfinite()
        size = truth[finite].abs().max().item() if finite.any() else 1.0
        errors[name] = tuple(
            (x[finite].double() - truth[finite]).abs().max().item() / max(size, 1e-300)
            if finite.any() else 0.0
            for x in (got[name], plain[name])
        )  # fmt: skip
    return calls[0].backend, errors


def compete(suite: str, contest: Contest, rounds: int, steps: Iterable[str]) -> Iterator[Result]:
    """Judge, then time both passes."""
    case, dtype = contest.case, contest.dtype
    try:
        backend, errors = judge(case, DTYPES[dtype])
    except AssertionError as error:
        yield Result(suite, case.name, dtype, "both", wrong=str(error))
        return
    for step in steps if case.wrt else ("forward",):
        entries = {"ours": contest.ours, **contest.peers}
        make = Entry.forward if step == "forward" else Entry.backward
        calls = {name: make(entry) for name, entry in entries.items()}
        of_step = [errors[n] for n in errors if n.startswith("d") == (step == "backward")]
        pick = 0 if step == "forward" else 1
        yield Result(
            suite, case.name, dtype, step, interleaved(calls, rounds, seconds=0.003),
            contest.flops and contest.flops[pick], contest.bytes and contest.bytes[pick],
            *map(max, zip(*of_step, strict=True)), backend, reads_alone=contest.reads_alone,
        )  # fmt: skip


def with_compiled(contest: Contest) -> Contest:
    """The same contest with one peer more: the plain code through torch.compile."""
    torch._dynamo.reset()  # one program each, as a user would have it, not a generalised one
    plain = list(contest.peers.values())[-1]
    compiled = replace(plain, function=torch.compile(plain.function, dynamic=False))
    return replace(contest, peers={**contest.peers, "compiled": compiled})


def grid(cases: Iterable[testing.Case], dtypes: Iterable[str]) -> Iterator[tuple[Any, str]]:
    """Every case at every dtype."""
    return itertools.product(cases, dtypes)
