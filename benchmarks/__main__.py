"""`python -m benchmarks SUITE…`: tables on the terminal, figures in benchmarks/results/."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import (
    bench_attention,
    bench_calls,
    bench_decode,
    bench_mlp,
    bench_models,
    bench_norm,
)
from benchmarks.contest import DTYPES, Result, compete, grid, with_compiled
from fast_transformer.timing import (
    Timing,
    conditions,
    copy_rate,
    interleaved,
    peak_flops,
    read_rate,
    steady,
)

OPS = {suite.SUITE: suite for suite in (bench_attention, bench_norm, bench_mlp, bench_decode)}
SUITES = [*OPS, bench_calls.SUITE, bench_models.SUITE]
HEADER = f"{'case':38} {'dtype':5} {'pass':8} {'ours':>16} {'best peer':>26} {'ratio':>6}"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--step", nargs="+", default=["forward", "backward"], dest="steps",
                        choices=["forward", "backward"])  # fmt: skip
    parser.add_argument("--compiled", action="store_true", help="torch.compile is a peer too")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved measurements of each")
    parser.add_argument("--threads", type=int, default=1, help="1 by default: figures of one core")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    unknown = set(chosen.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    return chosen


def results(suite: str, o: argparse.Namespace) -> Iterator[Result]:
    """Run one suite."""
    if suite in OPS:
        cases = [case for case in OPS[suite].CASES if o.only in case.name]
        for case, dtype in grid(cases, o.dtype):
            contest = OPS[suite].contest(case, dtype)
            if o.compiled:
                contest = with_compiled(contest)
            yield from compete(suite, contest, o.rounds, o.steps)
        return
    if suite == bench_calls.SUITE:
        pairs = ((name, "fp32", pair) for name, pair in bench_calls.pairs().items())
    else:
        pairs = bench_models.pairs(o.only, [dtype for dtype in o.dtype if dtype != "fp16"])
    for name, dtype, pair in pairs:
        if isinstance(pair, str):
            yield Result(suite, name, dtype, "", wrong=pair)
            continue
        calls = dict(zip(("ours", "pytorch"), pair, strict=True))
        yield Result(suite, name, dtype, "", interleaved(calls, o.rounds, seconds=0.005))


def show(r: Result) -> None:
    """One line of the table."""
    name = f"{r.case:38} {r.dtype:5} {r.step:8}"
    if r.wrong:
        print(f"{name} WRONG, so not timed: {r.wrong}", flush=True)
        return
    ours, best = r.timings["ours"], r.timings[r.best]
    line = f"{name} {_time(ours):>16} {r.best:>9} {_time(best):>16} {r.ratio:5.2f}×"
    line += " (reference)" if r.backend == "reference" else ""
    line += limit(r)
    if r.error or r.plain_error:
        line += f"  error {r.error:.1e} (plain {r.plain_error:.1e})"
    if budget := bench_calls.BUDGET.get(r.case) if r.suite == bench_calls.SUITE else None:
        line += f"  {(ours.median - best.median) * 1e6:+.1f} µs, budget {budget * 1e6:+.0f} µs"
    print(line, flush=True)


def limit(r: Result) -> str:
    """The rate of ours, and the part that it is of what all threads could do."""
    seconds, threads = r.timings["ours"].median, torch.get_num_threads()
    if r.flops is not None:
        rate, unit, peak = r.flops / seconds, "GFLOP/s", peak_flops(DTYPES[r.dtype])
    elif r.bytes is not None:
        # powers of two, so that shapes of about one size share a measurement
        size = 1 << max(12, round(r.bytes / threads).bit_length())
        peak = read_rate(size) if r.reads_alone else copy_rate(size)
        rate, unit = r.bytes / seconds, "GB/s"
    else:
        return ""
    part = f" {rate / peak / threads:4.0%} of the limit" if peak else ""
    return f"  {rate / 1e9:5.0f} {unit:7}{part}"


def _time(timing: Timing) -> str:
    seconds = timing.median
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.2f} {unit} ±{timing.spread:3.0%}"


def commit() -> str:
    """The commit of this tree, with a + where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Run the suites and write one file for each."""
    o = options()
    steady(o.threads)
    facts = conditions() | {"commit": commit(), "rounds": o.rounds}
    print(f"{facts['processor']}, {o.threads} threads, {facts['isa']}, torch {facts['torch']}")
    wrong = 0
    for suite in o.suites or SUITES:
        print(f"\n{suite}\n{HEADER}")
        start, found = time.perf_counter(), []
        for result in results(suite, o):
            show(result)
            found.append(result)
        timed = [r for r in found if not r.wrong]
        wrong += len(found) - len(timed)
        behind = sorted((r for r in timed if r.behind), key=lambda r: r.ratio)
        print(f"{len(timed)} timed in {time.perf_counter() - start:.0f} s, behind PyTorch in "
              f"{len(behind)}, wrong {len(found) - len(timed)}")  # fmt: skip
        for r in behind:
            print(f"  behind: {r.case} {r.dtype} {r.step} {r.ratio:.2f}×")
        o.output.mkdir(parents=True, exist_ok=True)
        file = o.output / f"{suite}.json"
        known = {"conditions": facts, "results": [r.figures() for r in found]}
        file.write_text(json.dumps(known, indent=1, default=str) + "\n")
        print(f"wrote {file}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
