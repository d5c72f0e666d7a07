"""A race: whole models side by side on the same work, judged before anything is timed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fast_transformer.benchmarks.contest import Result, physical_limit
from fast_transformer.benchmarks.memory import peak_memory
from fast_transformer.timing import interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_ROUNDS_OF_SECONDS = 3  # where a call takes a second or more
NOTHING = 1e-3
Call = Callable[[], object]


@dataclass(frozen=True)
class Programme:
    """Which races are run.

    only: those whose name contains this. full: those that take minutes too. compiled: what
    torch.compile makes of the stock model takes part.
    """

    only: str
    dtypes: tuple[str, ...]
    full: bool
    compiled: bool

    def wants(self, name: str) -> bool:
        """Whether a race of this name is run."""
        return self.only in name


@dataclass(frozen=True)
class Race:
    """One piece of work, and who does it.

    calls: "ours", "pytorch" and other peers. unavailable: peers that do not run here, and why.
    wrong: why ours must not be timed. error, plain_error: of ours and of the stock model in this
    dtype, relative to the largest value. flops, bytes: of the work, whichever it is bound by; the
    bytes are read so many `times`.
    long: a call takes about a second or more.
    """

    name: str
    kind: str
    dtype: str
    step: str
    calls: Mapping[str, Call] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    wrong: str | None = None
    error: float = 0.0
    plain_error: float = 0.0
    flops: float | None = None
    bytes: float | None = None
    times: int = 1
    long: bool = False

    def run(self, suite: str, rounds: int) -> Result:
        """Time every call that works, side by side."""
        if self.wrong is not None:
            return Result(suite, self.name, self.kind, self.dtype, self.step, wrong=self.wrong)
        calls, unavailable = dict(self.calls), dict(self.unavailable)
        memory = {}
        for name, call in self.calls.items():
            try:
                call()
                memory[name] = peak_memory(call)
            except Exception as error:
                if name == "ours":
                    raise
                unavailable[name] = reason(error)
                del calls[name]
        rounds = min(rounds, MOST_ROUNDS_OF_SECONDS) if self.long else rounds
        return Result(
            suite, self.name, self.kind, self.dtype, self.step,
            timings=interleaved(calls, rounds, seconds=0.005), unavailable=unavailable,
            flops=self.flops, bytes=self.bytes and self.bytes * self.times,
            limit=physical_limit(self.flops, self.bytes, self.dtype, reads_alone=True),
            memory=memory, error=self.error, plain_error=self.plain_error,
        )  # fmt: skip


def reason(error: Exception) -> str:
    """What an exception says, in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"


def errors(
    found: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
) -> tuple[float, float]:
    """The worst error of ours and of the stock model, each relative to a tensor's largest value.

    A tensor that is next to nothing beside the others, as the gradient of a key's bias is, which no
    softmax sees, counts as if it were `NOTHING` of the largest.
    """
    worst, sizes = [0.0, 0.0], {name: x.abs().max().item() for name, x in truth.items()}
    for name, exact in truth.items():
        size = max(sizes[name], NOTHING * max(sizes.values()), 1e-30)
        for i, x in enumerate((found[name], plain[name])):
            error = (x.float() - exact).abs().max().item() / size
            worst[i] = max(worst[i], error) if error == error else float("nan")
    return worst[0], worst[1]


def objection(error: float, plain_error: float, floor: float) -> str | None:
    """Why an answer that is off by `error` is wrong, or None; a NaN always is."""
    if error <= 2 * plain_error + floor:
        return None
    return f"off by {error:.1e}, the stock model by {plain_error:.1e}"
