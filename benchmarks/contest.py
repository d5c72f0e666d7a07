"""One contest: an op of ours and its peers on the same work, timed side by side, judged first.

The answer is checked against float64 before anything is timed; a wrong one gets no figures. The
physical limit stands beside every figure: what the processor can multiply or move in that time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fast_transformer import backends, testing
from fast_transformer.benchmarks.memory import peak_memory
from fast_transformer.timing import Timing, copy_rate, interleaved, peak_flops, read_rate

Function = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = ("forward", "backward")


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
        outs = out if isinstance(out, tuple) else (out,)
        grads = [torch.randn_like(x) for x in outs]
        return lambda: torch.autograd.grad(outs, list(leaves.values()), grads, retain_graph=True)

    def training(self) -> Callable[[], object]:
        """Forward pass and gradient: what lives between the two is their memory."""
        return lambda: self.backward()()


@dataclass(frozen=True)
class Contest:
    """A case of `testing.CASES` at one dtype, with ours and what PyTorch offers for it.

    peers: an entry, or why there is none. plain: the peer that torch.compile compiles too.
    flops, bytes: of the forward and of the backward pass; whichever the op is bound by is given.
    reads_alone: the bytes are read, and next to nothing is written.
    judged: the case that is held against float64, where that of this one would take too long.
    only_compiled: makes the peers that torch.compile has to compile.
    """

    case: testing.Case
    dtype: str
    ours: Entry
    peers: Mapping[str, Entry | str]
    plain: str = "pytorch"
    flops: tuple[float, float] | None = None
    bytes: tuple[float, float] | None = None
    reads_alone: bool = False
    judged: testing.Case | None = None
    only_compiled: Callable[[], Mapping[str, Entry | str]] = dict


@dataclass(frozen=True)
class Result:
    """What one pass ("forward" or "backward") of a contest gave.

    timings, memory: by contender; memory is the peak above the inputs, in bytes, of the pass, with
    the forward pass before it where it is a backward one. unavailable: peers that did not run, and
    why. flops, bytes: the work; limit: how much of it all threads could do in a second.
    """

    suite: str
    case: str
    kind: str
    dtype: str
    step: str
    timings: Mapping[str, Timing] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    limit: float | None = None
    memory: Mapping[str, int | None] = field(default_factory=dict)
    error: float = 0.0
    plain_error: float = 0.0
    shape: tuple[int, ...] = ()
    judged_shape: tuple[int, ...] = ()
    backend: str = ""
    wrong: str | None = None

    @property
    def best(self) -> str | None:
        """The fastest peer; None where none ran."""
        peers = set(self.timings) - {"ours"}
        return min(peers, key=lambda name: self.timings[name].median, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is than the fastest peer."""
        best = self.best
        return best and self.timings[best].median / self.timings["ours"].median

    @property
    def behind(self) -> bool:
        """Whether a peer is faster, by more than the cost of a call where that is all there is."""
        if (name := self.best) is None:
            return False
        best, ours = self.timings[name].median, self.timings["ours"].median
        return ours > best and not (best < 20e-6 and ours - best <= 3e-6)

    def fraction(self, name: str) -> float | None:
        """What part of the physical limit a contender reaches."""
        work = self.flops if self.flops is not None else self.bytes
        if work is None or not self.limit:
            return None
        return work / self.timings[name].median / self.limit

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        known = {name: getattr(self, name) for name in self.__dataclass_fields__}
        known["timings"] = {
            name: {
                "median_seconds": t.median,
                "spread": t.spread,
                "seconds": t.seconds,
                "of_limit": self.fraction(name),
            }
            for name, t in self.timings.items()
        }
        if self.wrong:
            return known
        return known | {"best_peer": self.best, "ratio": self.ratio, "behind": self.behind}


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
    """Judge, then measure both passes."""
    case, dtype, judged = contest.case, contest.dtype, contest.judged or contest.case
    common = {
        "suite": suite, "case": case.name, "kind": case.kind, "dtype": dtype,
        "shape": case.shape, "judged_shape": judged.shape,
    }  # fmt: skip
    try:
        backend, errors = judge(judged, DTYPES[dtype])
    except AssertionError as error:
        yield Result(**common, step="both", wrong=str(error))
        return
    for step in steps if case.wrt else STEPS[:1]:
        calls, memory, unavailable = prepare({"ours": contest.ours, **contest.peers}, step)
        of_step = [errors[n] for n in errors if n.startswith("d") == (step == "backward")]
        error, plain_error = map(max, zip(*of_step, strict=True))
        flops, moved = (
            work and work[STEPS.index(step)] for work in (contest.flops, contest.bytes)
        )  # fmt: skip
        yield Result(
            **common, step=step, timings=interleaved(calls, rounds, seconds=0.003),
            unavailable=unavailable, flops=flops, bytes=moved,
            limit=physical_limit(flops, moved, dtype, contest.reads_alone), memory=memory,
            error=error, plain_error=plain_error, backend=backend,
        )  # fmt: skip


def prepare(
    entries: Mapping[str, Entry | str], step: str
) -> tuple[dict[str, Callable[[], object]], dict[str, int | None], dict[str, str]]:
    """Call everyone once: (what is to be timed, the peak of its memory, why others do not run)."""
    calls, memory, unavailable = {}, {}, {}
    for name, entry in entries.items():
        if isinstance(entry, str):
            unavailable[name] = entry
            continue
        try:
            call = entry.forward() if step == "forward" else entry.backward()
            call()  # whatever is made once is made here, and counted nowhere
        except Exception as error:
            if name == "ours":
                raise
            told = str(error).strip().partition("\n")[0].rstrip(".")
            unavailable[name] = f"{type(error).__name__}: {told}"
            continue
        calls[name] = call
        memory[name] = peak_memory(call if step == "forward" else entry.training())
    return calls, memory, unavailable


def physical_limit(
    flops: float | None, moved: float | None, dtype: str, reads_alone: bool = False
) -> float | None:
    """FLOP/s or bytes a second that all threads together can do of this work at best."""
    threads = torch.get_num_threads()
    if flops is not None:
        peak = peak_flops(DTYPES[dtype])
    elif moved is not None:
        # powers of two, so that shapes of about one size share a measurement
        rate = read_rate if reads_alone else copy_rate
        peak = rate(1 << max(12, round(moved / threads).bit_length()))
    else:
        return None
    return peak and peak * threads


def with_compiled(contest: Contest) -> Contest:
    """The same contest with more peers: the plain code and whatever else torch.compile takes."""
    torch._dynamo.reset()  # one program each, as a user would have it, not a generalised one
    plain = contest.peers[contest.plain]
    if isinstance(plain, Entry):
        plain = replace(plain, function=torch.compile(plain.function, dynamic=False))
    more = {"compiled": plain, **contest.only_compiled()}
    return replace(contest, peers={**contest.peers, **more})
