"""What a suite measures, case by case."""

from collections.abc import Iterator
from dataclasses import dataclass

from fast_transformer import testing
from fast_transformer.benchmarks import (
    bench_attention,
    bench_calls,
    bench_decode,
    bench_embedding,
    bench_loss,
    bench_mlp,
    bench_models,
    bench_norm,
    bench_optimizer,
    bench_relative,
    bench_rotary,
    roofline,
)
from fast_transformer.benchmarks.contest import STEPS, Result, compete, with_compiled
from fast_transformer.timing import interleaved

OPS = {
    suite.SUITE: suite
    for suite in (
        bench_attention,
        bench_relative,
        bench_decode,
        bench_norm,
        bench_mlp,
        bench_loss,
        bench_rotary,
        bench_embedding,
    )
}
FEW = 3
SUITES = (roofline.SUITE, *OPS, bench_optimizer.SUITE, bench_calls.SUITE, bench_models.SUITE)


@dataclass(frozen=True)
class Options:
    """Which part of the suites runs, and how often.

    only: cases whose name contains this. full: those that take minutes too. quick: one of each
    kind alone. few: `FEW` of each kind at most, evenly spread over its sizes. rounds: interleaved
    measurements of each contender. compiled: torch.compile of the plain code is a peer, and what
    cannot run without it.
    """

    only: str = ""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    steps: tuple[str, ...] = STEPS
    rounds: int = 5
    compiled: bool = False
    quick: bool = False
    full: bool = False
    few: bool = False


def results(suite: str, o: Options) -> Iterator[Result]:
    """Run one suite against its peers."""
    if suite in OPS:
        yield from op_results(suite, o)
    elif suite == bench_optimizer.SUITE:
        yield from bench_optimizer.results(o.only, o.dtypes, o.rounds, o.compiled, o.quick)
    elif suite == bench_calls.SUITE:
        for name, pair in bench_calls.pairs().items():
            if o.only in name:
                yield timed(suite, name, name.partition(",")[0], "fp32", pair, o.rounds)
    else:
        for race in bench_models.races(o.only, o.dtypes, o.quick, o.full, o.compiled):
            yield race.run(suite, o.rounds)


def op_results(suite: str, o: Options) -> Iterator[Result]:
    """Every case of an op's suite at every dtype."""
    for case in cases(suite, o):
        for dtype in o.dtypes:
            contest = OPS[suite].contest(case, dtype)
            if o.compiled:
                contest = with_compiled(contest)
            yield from compete(suite, contest, o.rounds, o.steps)


def cases(suite: str, o: Options) -> list[testing.Case]:
    """The cases of an op's suite that are wanted."""
    known = [*OPS[suite].CASES, *(getattr(OPS[suite], "LONG", []) if o.full else [])]
    found = [case for case in known if o.only in case.name]
    if not o.quick and not o.few:
        return found
    kinds: dict[str, list[testing.Case]] = {}
    for case in found:
        kinds.setdefault(case.kind, []).append(case)
    return [case for each in kinds.values() for case in spread(each, 1 if o.quick else FEW)]


def spread(cases: list[testing.Case], most: int) -> list[testing.Case]:
    """Return `most` of the cases at most: the middle of that many equal parts of the list."""
    count = min(most, len(cases))
    return [cases[((2 * i + 1) * len(cases) - 1) // (2 * count)] for i in range(count)]


def timed(
    suite: str, name: str, kind: str, dtype: str, pair: bench_calls.Pair, rounds: int
) -> Result:
    """Ours and PyTorch's side by side."""
    calls = dict(zip(("ours", "pytorch"), pair, strict=True))
    return Result(suite, name, kind, dtype, "", interleaved(calls, rounds, seconds=0.005))
