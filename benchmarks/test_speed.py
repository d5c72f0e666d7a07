"""The table of cases under pytest-benchmark: `pytest benchmarks --benchmark-only`.

For its statistics, histograms and history of single contenders (-k picks them). It times one after
the other; figures to quote come from `fast-transformer bench`, which interleaves them.
"""

import functools

import pytest

pytest.importorskip("pytest_benchmark")

from fast_transformer.benchmarks.contest import DTYPES, STEPS, Contest, judge  # noqa: E402
from fast_transformer.benchmarks.suites import OPS  # noqa: E402
from fast_transformer.timing import pin, steady  # noqa: E402

# contenders last, so that those of one contest follow one another
GRID = [
    pytest.param(suite, case, dtype, step, name, id=f"{case.name}-{dtype}-{step}-{name}")
    for suite, module in OPS.items()
    for case in module.CASES
    for dtype in ("fp32", "bf16")
    for step in (STEPS if case.wrt else STEPS[:1])
    for name in ("ours", *module.PEERS)
]


@pytest.fixture(scope="session", autouse=True)
def one_processor():
    """Time as the command does: pinned, on an allocator that keeps its memory."""
    pin(1)
    steady(1)


@functools.lru_cache(maxsize=1)
def judged(suite: str, case, dtype: str) -> Contest:
    """The contest, after ours was held to its error: a wrong answer has no speed here either."""
    contest = OPS[suite].contest(case, dtype)
    judge(contest.judged or case, DTYPES[dtype])
    return contest


@pytest.mark.parametrize(("suite", "case", "dtype", "step", "name"), GRID)
def test_speed(benchmark, suite, case, dtype, step, name):
    """One contender at one pass of one case."""
    contest = judged(suite, case, dtype)
    entry = contest.ours if name == "ours" else contest.peers.get(name, "it has no such way")
    if isinstance(entry, str):
        pytest.skip(f"{name} is not available: {entry}")
    benchmark.group = f"{case.name} {dtype} {step}"
    benchmark(entry.forward() if step == "forward" else entry.backward())
