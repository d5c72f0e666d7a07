"""Benchmarks: they run, they find a wrong answer before they time it, and timing is fair."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_transformer import timing

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("the tests lie apart from the source tree", allow_module_level=True)


def benchmarks(*arguments, before=""):
    program = f"import runpy, sys; {before}runpy.run_module('benchmarks', run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("suite", "case"),
    [
        ("attention", "full-T63-D64"),
        ("attention", "causal-T77-D64"),
        ("norm", "add-dropout-1x768"),
        ("mlp", "mlp-1x384"),
        ("decode", "decode-B1-H12-12-S128-D64"),
    ],
)
def test_a_suite_runs(suite, case, tmp_path):
    done = benchmarks(suite, "--only", case, "--rounds", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"{suite}.json").read_text())
    assert [(r["case"], r["dtype"], r["step"]) for r in found["results"]] == [
        (case, dtype, step)
        for dtype in ("fp32", "bf16")
        for step in (("forward",) if suite == "decode" else ("forward", "backward"))
    ]
    for r in found["results"]:
        assert r["wrong"] is None and r["ratio"] > 0 and r["error"] > 0
        assert r["timings"].keys() > {"ours"}
    assert found["conditions"]["torch"] == torch.__version__
    assert found["conditions"]["commit"]


def test_calls_are_measured(tmp_path):
    done = benchmarks("calls", "--rounds", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "budget +3 µs" in done.stdout and "budget +9 µs" in done.stdout


def test_a_wrong_answer_has_no_speed(tmp_path):
    spoil = (
        "from fast_transformer import backends, ops; right = ops.layer_norm; "
        "ops.layer_norm = lambda *a, **k: right(*a, **k) * (1 if backends.chosen() else 1.001); "
    )
    options = ("norm", "--only", "norm-1x768", "--dtype", "fp32", "--rounds", "1")
    done = benchmarks(*options, "--output", str(tmp_path), before=spoil)
    assert done.returncode == 1
    assert "WRONG, so not timed" in done.stdout
    (result,) = json.loads((tmp_path / "norm.json").read_text())["results"]
    assert result["wrong"] and not result["timings"] and "ratio" not in result


@pytest.fixture
def suites(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bench_attention, bench_decode, bench_mlp, bench_norm

    return {s.SUITE: s for s in (bench_attention, bench_decode, bench_norm, bench_mlp)}


def small(case):
    """The case on a shape of no consequence; what it computes stays."""
    if case.family == "attention":
        return dataclasses.replace(case, shape=(3, 2, 33, 33, 16))
    if case.family == "decode":
        B, H, KV, T = case.shape[:4]
        return dataclasses.replace(case, shape=(min(B, 2), H, KV, T, 33, 16))
    return dataclasses.replace(case, shape=tuple(5 + i for i in range(len(case.shape))))


@pytest.mark.parametrize("suite", ["attention", "decode", "norm", "mlp"])
def test_peers_compute_the_same(suites, suite):
    for case in map(small, suites[suite].CASES):
        if getattr(case, "dropout_p", 0) > 0:
            continue
        contest = suites[suite].contest(case, "fp32")
        ours = contest.ours.function(**contest.ours.inputs)
        for name, peer in contest.peers.items():
            theirs = peer.function(**peer.inputs)
            if case.op == "attention_varlen":
                lengths = suites[suite].lengths(contest.ours.inputs, "q")
                rows = theirs.transpose(1, 2)
                theirs = torch.cat([x[:n] for x, n in zip(rows, lengths, strict=True)])
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{case} {name}")


def test_causal_counts_half(suites):
    full, causal = (
        suites["attention"].contest(case, "fp32")
        for case in suites["attention"].CASES
        if case.name in ("full-T128-D64", "causal-T128-D64")
    )
    assert causal.flops[0] / full.flops[0] == pytest.approx(129 / 256)


def test_interleaved_calls_everything_once_a_round():
    called, ticks = [], []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    found = timing.interleaved(calls, rounds=20, tick=lambda: ticks.append(1))
    assert len(ticks) == timing.measurements(calls, 20)
    rounds = [tuple(called[6 + 3 * i : 9 + 3 * i]) for i in range(20)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3  # shuffled
    assert all(len(t.seconds) == 20 and t.median > 0 for t in found.values())


def test_spread_is_half_the_quartiles():
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 5.0)).median == 3
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)
    assert timing.Timing((1.0,)).spread == 0
