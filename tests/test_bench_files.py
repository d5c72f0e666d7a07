"""What is made of a run's file: a comparison with another, a picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_transformer.benchmarks import compare, report

for needed in ("typer", "rich", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from fast_transformer.cli import main; sys.argv[0] = 'fast-transformer'; "
BASE = (1.00, 1.01, 1.02, 1.03, 1.04)


def bench(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", f"{PROGRAM}main()", "bench", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def timing(seconds, part=0.5):
    return {"median_seconds": sorted(seconds)[len(seconds) // 2], "seconds": list(seconds),
            "of_limit": part}  # fmt: skip


def run(rows, peer=BASE, **conditions):
    """A file of figures: case -> seconds of ours."""
    facts = {"processor": "P", "isa": "avx2", "threads": 1} | conditions
    results = [
        {"suite": "attention", "case": name, "kind": name.split("-")[0], "dtype": "fp32",
         "step": "forward", "shape": [1, 1, int(name.split("-T")[1].split("-")[0]), 1, 64],
         "wrong": None, "timings": {"ours": timing(seconds), "sdpa": timing(peer, 0.25)}}
        for name, seconds in rows.items()
    ]  # fmt: skip
    return {"conditions": facts, "results": results}


def scaled(factor):
    return tuple(factor * x for x in BASE)


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        (BASE, "same"),
        (scaled(1.5), "slower"),
        (scaled(0.5), "faster"),
        (scaled(1.02), "same"),  # nearer than the threshold
        ((0.5, 1.03, 1.5, 1.6, 1.01), "same"),  # far in the median, lost in its own noise
        ((1.5, 1.5), "same"),  # too few rounds to tell
        ((1.5, 1.5, 1.5), "slower"),
    ],
)
def test_verdicts(seconds, verdict):
    (row,) = compare.rows(run({"full-T64-D64": BASE}), run({"full-T64-D64": seconds}))
    assert row.verdict == verdict
    assert row.peers == 1


def test_mann_whitney_is_exact():
    """By hand: 2 of the 20 orders of 3 and 3 are as far apart, 2 of the 252 of 5 and 5."""
    assert compare.mann_whitney((1, 2, 3), (4, 5, 6)) == pytest.approx(2 / 20)
    assert compare.mann_whitney(range(5), range(5, 10)) == pytest.approx(2 / 252)
    assert compare.mann_whitney((1, 4), (2, 3)) == 1
    assert compare.mann_whitney((1, 1, 1, 1), (1, 1, 1, 1)) == 1
    # scipy.stats.mannwhitneyu(method="exact"): 1, 2, 3, 5 against 4, 6, 7, 8
    assert compare.mann_whitney((1, 2, 3, 5), (4, 6, 7, 8)) == pytest.approx(4 / 70)
    # many rounds: the normal distribution, near the exact 2 / C(24, 12)
    assert compare.mann_whitney(range(12), range(12, 24)) == pytest.approx(3.2e-5, rel=0.1)


def test_two_files_are_compared(tmp_path):
    names = ("full-T64-D64", "causal-T64-D64", "full-T128-D64")
    first = run(dict.fromkeys(names, BASE))
    second = run(dict(zip(names, (BASE, scaled(2), scaled(0.5)), strict=True)), isa="avx512")
    second["results"].append({**second["results"][0], "case": "full-T9-D64"})
    for name, content in (("a.json", first), ("b.json", second)):
        (tmp_path / name).write_text(json.dumps(content))
    files = (str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    done = bench("compare", *files)
    assert done.returncode == 0, done.stderr
    slower, faster = (
        next(line for line in done.stdout.splitlines() if f" {verdict} " in line)
        for verdict in ("slower", "faster")
    )
    assert "causal-T64-D64" in slower and "×2.000" in slower and "p 0.008" in slower
    assert "full-T128-D64" in faster
    assert "3 rows: 1 faster, 1 slower, 1 same; time of ours ×1.000 in the" in done.stdout
    assert "in the first alone 0 rows, in the second alone 1" in done.stdout
    assert "warning: isa is avx2 in the first and avx512 in the second" in done.stdout
    assert done.stdout.count("warning") == 1
    assert bench("compare", *files, "--fail-if-slower").returncode == 1
    assert bench("compare", files[0], files[0], "--fail-if-slower").returncode == 0
    assert bench("compare", *files, "--threshold", "2", "--fail-if-slower").returncode == 0


def test_what_makes_runs_bad_to_compare_is_said():
    first, second = run({"full-T64-D64": BASE}), run({"full-T64-D64": BASE}, peer=scaled(1.3))
    (told,) = compare.warnings(first, second, compare.rows(first, second))
    assert told == "warning: PyTorch took ×1.300 of its own time: the machine was not alike"
    second = run({"full-T64-D64": BASE[:2]}, threads=2)
    told = compare.warnings(first, second, compare.rows(first, second))
    assert told[0] == "warning: threads is 1 in the first and 2 in the second"
    assert told[1] == "warning: 5 and 2 rounds allow no verdict but same; 4 and 4 can"


def test_files_of_something_else_are_refused(tmp_path):
    other, empty = tmp_path / "other.json", tmp_path / "empty.json"
    other.write_text("[1]")
    empty.write_text(json.dumps(run({})))
    for arguments in (("compare", empty, other), ("plot", other), ("plot", tmp_path / "none")):
        done = bench(*map(str, arguments))
        assert done.returncode == 1
        assert "is no file of figures that fast-transformer bench has written" in done.stderr
    done = bench("compare", str(empty), str(empty))
    assert done.returncode == 1 and "have no row in common" in done.stderr
    done = bench("plot", str(empty))
    assert done.returncode == 1 and "there is no attention forward at head_dim 64" in done.stderr


def test_the_plot_is_drawn(tmp_path):
    names = [f"{kind}-T{n}-D64" for kind in ("full", "causal") for n in (64, 128, 512)]
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run(dict.fromkeys(names, BASE))))
    done = bench("plot", str(file))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    from fast_transformer.benchmarks.plot import points

    found = points(json.loads(file.read_text())["results"], "causal", "fp32", "ours")
    assert found == [(64, 0.5), (128, 0.5), (512, 0.5)]


def test_means_are_geometric_and_name_the_worst():
    def figures(case, ratio, wrong=None):
        return {"case": case, "kind": "full", "step": "forward", "dtype": "fp32", "ratio": ratio,
                "wrong": wrong, "behind": ratio is not None and ratio < 1,
                "best_peer": "sdpa"}  # fmt: skip

    rows = [figures("a", 4.0), figures("b", 0.25), figures("c", None), figures("d", 9.0, "off")]
    (by,) = report.means(rows).values()
    assert by["fp32"].mean == pytest.approx(1)
    assert (by["fp32"].worst, by["fp32"].at, by["fp32"].count) == (0.25, "b", 2)
    assert report.behind(rows) == ["b fp32 forward 0.25× of sdpa"]


def test_pytest_benchmark_walks_the_table():
    pytest.importorskip("pytest_benchmark")
    if not (ROOT / "benchmarks").exists():
        pytest.skip("the tests lie apart from the source tree")
    options = ("--benchmark-only", "--benchmark-max-time=0.01", "-k", "norm-1x768-fp32-forward")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "norm-1x768-fp32-forward-ours" in done.stdout
    assert "norm-1x768-fp32-forward-pytorch" in done.stdout
