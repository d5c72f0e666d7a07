"""`fast-transformer bench`: every op and model against PyTorch, and what to do with the figures."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fast_transformer.benchmarks import compare as comparison
from fast_transformer.benchmarks import memory, report, roofline
from fast_transformer.benchmarks.contest import DTYPES, STEPS
from fast_transformer.benchmarks.suites import SUITES, Options, results
from fast_transformer.timing import conditions, pin, steady

ALL = "all"
ALONE = 0.95  # of its processor's time is what a thread gets that has it to itself
TREE = Path(roofline.__file__).parents[1]


def run(suite: str, options: Options, threads: int, output: Path) -> None:
    """Run one suite or all, print tables, and write one file into the folder `output`.

    All of them take a few cases of each kind, unless the options say full.
    """
    for name, given, accepted in (
        ("--suite", (suite,), (*SUITES, ALL)),
        ("--dtype", options.dtypes, tuple(DTYPES)),
        ("--step", options.steps, STEPS),
    ):
        for value in given:
            if value not in accepted:
                sys.exit(f"{name} is {value!r}; accepted are {', '.join(accepted)}.")
    try:
        pinned = pin(threads)
    except ValueError as error:
        sys.exit(f"--{error}")
    steady(threads)
    memory.one_arena()
    facts = conditions() | {"pinned": pinned, "commit": commit(), "rounds": options.rounds}
    print(
        f"{report.setting(facts)}, pinned to processor {', '.join(map(str, pinned))}; "
        f"torch {facts['torch']}, commit {facts['commit']}"
    )
    output.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    file = output / f"{suite}-{stamp}.json"
    known: dict[str, Any] = {"conditions": facts, "roofline": [], "results": []}
    wall, own = time.perf_counter(), time.process_time()
    if suite == ALL and not options.full:
        options = replace(options, few=True)
    for each in SUITES if suite == ALL else (suite,):
        print(f"\n{each}")
        if each == roofline.SUITE:
            limits = list(roofline.measure(threads, options.quick))
            roofline.show(limits)
            known["roofline"] = [limit.figures() for limit in limits]
        else:
            known["results"] += contests(each, options)
        facts["processor_share"] = (time.process_time() - own) / (time.perf_counter() - wall)
        file.write_text(json.dumps(known, indent=1, default=str) + "\n")  # what is done is kept
    if threads == 1 and facts["processor_share"] < ALONE:
        print(
            f"\nwarning: this process had {facts['processor_share']:.0%} of its processor; others "
            "ran there, and what little they leave makes figures that do not repeat"
        )
    print(f"\nwrote {file}")
    sys.exit(any(r["wrong"] for r in known["results"]))


def contests(suite: str, options: Options) -> list[report.Figures]:
    """Run one suite against its peers, tell of it, and return its figures."""
    print(report.HEADER)
    start, found = time.perf_counter(), []
    for result in results(suite, options):
        print(report.line(result), flush=True)
        found.append(result.figures())
    print(report.means_table(found))
    behind = report.behind(found)
    wrong = sum(r["wrong"] is not None for r in found)
    print(
        f"{len(found) - wrong} timed in {time.perf_counter() - start:.0f} s, behind PyTorch in "
        f"{len(behind)}, wrong {wrong}"
    )
    for text in behind:
        print(f"  behind: {text}")
    for text in report.unavailable(found):
        print(f"  {text}")
    return found


def commit() -> str:
    """The commit of the source tree, with a + where files differ from it; "unknown" without one."""
    if not (TREE / "setup.py").exists():  # installed: a tree around it would be another project's
        return "unknown"
    command = ["git", "-C", str(TREE), "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def compare(first: Path, second: Path, threshold: float, fail_if_slower: bool) -> None:
    """Print every row that two files share, and the sum of it."""
    a, b = load(first), load(second)
    rows = comparison.rows(a, b, threshold)
    if not rows:
        sys.exit(f"{first} and {second} have no row in common.")
    for row in rows:
        print(comparison.line(row))
    print(comparison.summary(rows))
    only = [len(comparison.timed(run)) - len(rows) for run in (a, b)]
    if any(only):
        print(f"in the first alone {only[0]} rows, in the second alone {only[1]}")
    for text in comparison.warnings(a, b, rows, threshold):
        print(text)
    if fail_if_slower and any(row.verdict == "slower" for row in rows):
        sys.exit(1)


def plot(file: Path, output: Path) -> None:
    """Draw the attention suite of a file."""
    from fast_transformer.benchmarks.plot import draw

    try:
        draw(load(file), output)
    except ValueError as error:
        sys.exit(f"{file}: {error}.")
    print(f"wrote {output}")


def load(file: Path) -> dict[str, Any]:
    """The figures of a run; ends the program where the file holds something else."""
    try:
        run = json.loads(file.read_text())
    except (OSError, ValueError):
        run = None
    if isinstance(run, dict) and run.keys() >= {"conditions", "results"}:
        return run
    sys.exit(f"{file} is no file of figures that fast-transformer bench has written.")
