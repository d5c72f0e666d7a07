"""Two runs of the benchmarks against each other, row by row, noise apart.

A row differs where the rounds of the two runs do by the exact two-sided Mann-Whitney test, at 5%,
and their medians by a share that is worth a word. The test alone would cry at one row of twenty
that chance has moved; the share alone at every row that is short.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

ALPHA = 0.05
SHARE = 0.03
SAME_MACHINE = ("processor", "isa", "threads")
MOST_ARRANGEMENTS = 200_000  # counted one by one up to here; beyond, the normal distribution is it

Run = Mapping[str, Any]  # what a file of figures holds
Key = tuple[str, str, str, str]  # suite, case, dtype, step


@dataclass(frozen=True)
class Row:
    """One row in both runs: how much longer ours takes in the second, and whether that is noise.

    peers: the same ratio of the fastest peer that both have; its distance from 1 is the machine's.
    """

    key: Key
    ratio: float
    p: float
    peers: float | None
    share: float

    @property
    def verdict(self) -> str:
        """How the second run is: "faster", "slower" or "same"."""
        if self.p > ALPHA or max(self.ratio, 1 / self.ratio) < 1 + self.share:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def rows(first: Run, second: Run, share: float = SHARE) -> list[Row]:
    """Every row that both runs timed, in the order of the first."""
    later = timed(second)
    return [_row(key, a, later[key], share) for key, a in timed(first).items() if key in later]


def timed(run: Run) -> dict[Key, Mapping[str, Any]]:
    """The rows of a run that have figures: contender -> seconds of its rounds."""
    return {
        (r["suite"], r["case"], r["dtype"], r["step"]): r["timings"]
        for r in run["results"]
        if r["timings"]
    }


def _row(key: Key, a: Mapping[str, Any], b: Mapping[str, Any], share: float) -> Row:
    common = [name for name in a if name in b and name != "ours"]
    best = min(common, key=lambda name: a[name]["median_seconds"], default=None)
    ours, theirs = (
        name and b[name]["median_seconds"] / a[name]["median_seconds"] for name in ("ours", best)
    )
    return Row(key, ours, mann_whitney(a["ours"]["seconds"], b["ours"]["seconds"]), theirs, share)


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p of the rank-sum test: could chance have sorted them so far apart?

    Wilcoxon 1945; Mann and Whitney 1947. Equal values share their mean rank. At the least it is
    2 / C(n + m, n): 0.1 for 3 and 3 rounds, 0.03 for 4 and 4.
    """
    pooled = sorted([*a, *b])
    ranks = {x: pooled.index(x) + (pooled.count(x) + 1) / 2 for x in pooled}
    found = sum(ranks[x] for x in a)
    n, m = len(a), len(b)
    middle = n * (n + m + 1) / 2
    if math.comb(n + m, n) > MOST_ARRANGEMENTS:
        deviation = math.sqrt(n * m * (n + m + 1) / 12)
        return math.erfc(abs(found - middle) / deviation / math.sqrt(2))
    sums = [sum(some) for some in combinations([ranks[x] for x in pooled], n)]
    far = sum(abs(s - middle) >= abs(found - middle) - 1e-9 for s in sums)
    return far / len(sums)


def warnings(first: Run, second: Run, found: Sequence[Row], share: float = SHARE) -> list[str]:
    """What makes two runs bad to compare."""
    a, b = first["conditions"], second["conditions"]
    told = [
        f"warning: {name} is {a.get(name)} in the first and {b.get(name)} in the second"
        for name in SAME_MACHINE
        if a.get(name) != b.get(name)
    ]
    both = timed(first), timed(second)
    rounds = {tuple(len(side[row.key]["ours"]["seconds"]) for side in both) for row in found}
    for n, m in sorted(rounds):
        if 2 / math.comb(n + m, n) > ALPHA:
            told.append(f"warning: {n} and {m} rounds allow no verdict but same; 4 and 4 can")
    drift = drift_of(found)
    if drift is not None and max(drift, 1 / drift) >= 1 + share:
        told.append(
            f"warning: PyTorch took ×{drift:.3f} of its own time: the machine was not alike"
        )
    return told


def drift_of(found: Iterable[Row]) -> float | None:
    """The geometric mean of the peers' ratios: by how much the machine, or torch, has changed."""
    peers = [row.peers for row in found if row.peers is not None]
    return statistics.geometric_mean(peers) if peers else None


def summary(found: Sequence[Row]) -> str:
    """Counts of verdicts, and the geometric means of ours and of the peers."""
    counts = {v: sum(row.verdict == v for row in found) for v in ("faster", "slower", "same")}
    ours = statistics.geometric_mean(row.ratio for row in found)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    text = f"{len(found)} rows: {told}; time of ours ×{ours:.3f} in the geometric mean"
    drift = drift_of(found)
    return text if drift is None else f"{text}, of PyTorch ×{drift:.3f}"


def line(row: Row) -> str:
    """One row on the terminal."""
    suite, case, dtype, step = row.key
    peers = "" if row.peers is None else f"  PyTorch ×{row.peers:.3f}"
    name = f"{suite:9} {case:38} {dtype:5} {step:8}"
    return f"{name} ×{row.ratio:.3f} {row.verdict:6} p {row.p:.3f}{peers}"
