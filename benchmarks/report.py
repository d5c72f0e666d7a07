"""What a run says: a line for each result, geometric means for each kind, what stays behind.

Lines are made of results as they come; sums of their figures, as a file holds them, so that the
terminal, the README and a comparison tell the same.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fast_transformer.benchmarks import bench_calls
from fast_transformer.benchmarks.contest import Result
from fast_transformer.timing import Timing

Figures = Mapping[str, Any]  # Result.figures()
HEADER = f"{'case':38} {'dtype':5} {'pass':8} {'ours':>16} {'best peer':>26} {'ratio':>6}"


def line(r: Result) -> str:
    """One line of the table."""
    name = f"{r.case:38} {r.dtype:5} {r.step:8}"
    if r.wrong:
        return f"{name} WRONG, so not timed: {r.wrong}"
    ours, best = r.timings["ours"], r.best
    text = f"{name} {_time(ours):>16}"
    if best is None:
        text += "  no peer"
    else:
        text += f" {best:>9} {_time(r.timings[best]):>16} {r.ratio:5.2f}×"
    text += " (reference)" if r.backend == "reference" else ""
    text += _rate(r)
    if r.memory.get("ours") is not None:
        text += f"  {_megabytes(r.memory['ours'])} MB"
        if best is not None:
            text += f" ({_megabytes(r.memory[best])})"
    if r.error or r.plain_error:
        text += f"  error {r.error:.1e} (plain {r.plain_error:.1e})"
    if best and (budget := bench_calls.BUDGET.get(r.case)) and r.suite == bench_calls.SUITE:
        over = ours.median - r.timings[best].median
        text += f"  {over * 1e6:+.1f} µs, budget {budget * 1e6:+.0f} µs"
    return text


def _time(timing: Timing) -> str:
    seconds = timing.median
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.2f} {unit} ±{timing.spread:3.0%}"


def _rate(r: Result) -> str:
    """The rate of ours, and the part that it is of what all threads could do."""
    work, unit = (r.flops, "GFLOP/s") if r.flops is not None else (r.bytes, "GB/s")
    if work is None:
        return ""
    part = r.fraction("ours")
    limit = "" if part is None else f" {part:4.0%} of the limit"
    return f"  {work / r.timings['ours'].median / 1e9:5.0f} {unit:7}{limit}"


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.1f}"


def setting(facts: Mapping[str, Any]) -> str:
    """On what a run was made, in words."""
    plural = "" if facts["threads"] == 1 else "s"
    return f"{facts['threads']} thread{plural} of {facts['processor']} ({facts['isa']})"


@dataclass(frozen=True)
class Mean:
    """The ratios to the best peer of all cases of one kind, summed up.

    mean: geometric. worst: the smallest ratio; at: its case.
    """

    mean: float
    worst: float
    at: str
    count: int


def means(results: Iterable[Figures]) -> dict[tuple[str, str], dict[str, Mean]]:
    """(kind, step) -> dtype -> Mean, in the order in which they come."""
    found: dict[tuple[str, str], dict[str, list[Figures]]] = {}
    for r in results:
        if not r["wrong"] and r["ratio"]:
            found.setdefault((r["kind"], r["step"]), {}).setdefault(r["dtype"], []).append(r)
    return {key: {d: _mean(rows) for d, rows in by.items()} for key, by in found.items()}


def _mean(rows: list[Figures]) -> Mean:
    worst = min(rows, key=lambda r: r["ratio"])
    mean = statistics.geometric_mean(r["ratio"] for r in rows)
    return Mean(mean, worst["ratio"], worst["case"], len(rows))


def means_table(results: Iterable[Figures]) -> str:
    """Geometric means on the terminal."""
    found = means(results)
    if not found:
        return ""
    width = 2 + max(len(kind) + len(step) for kind, step in found)
    lines = ["how many times faster than the best peer, geometric means (worst point)"]
    for (kind, step), by in found.items():
        cells = [f"{d} {m.mean:5.2f}× ({m.worst:.2f}× {m.at})" for d, m in by.items()]
        label = f"{kind}, {step}" if step else kind
        lines.append(f"  {label:{width}} " + "   ".join(f"{cell:46}" for cell in cells).rstrip())
    return "\n".join(lines)


def behind(results: Iterable[Figures]) -> list[str]:
    """A line for every point where a peer is faster, the worst first."""
    slower = [r for r in results if not r["wrong"] and r["behind"]]
    return [
        f"{r['case']} {r['dtype']} {r['step']} {r['ratio']:.2f}× of {r['best_peer']}"
        for r in sorted(slower, key=lambda r: r["ratio"])
    ]


def unavailable(results: Iterable[Figures]) -> list[str]:
    """A line for every reason why a peer did not run, with the number of points."""
    counts: dict[str, int] = {}
    for r in results:
        for name, reason in r["unavailable"].items():
            text = f"{name} ({r['step']}) not available: {reason}"
            counts[text] = counts.get(text, 0) + 1
    return [f"{text}, at {count} points" for text, count in counts.items()]
