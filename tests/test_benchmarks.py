"""Benchmarks: they run, they find a wrong answer before they time it, and timing is fair."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from fast_transformer import _library, testing, timing
from fast_transformer.benchmarks import attention_masks as masks
from fast_transformer.benchmarks import (
    attention_peers,
    bench_attention,
    bench_decode,
    bench_norm,
    bench_relative,
    memory,
    report,
    roofline,
    suites,
)
from fast_transformer.benchmarks.contest import Entry, compete

for needed in ("typer", "rich"):
    pytest.importorskip(needed)

PROGRAM = "import sys; from fast_transformer.cli import main; sys.argv[0] = 'fast-transformer'; "
SUITES = suites.OPS
needs_kernels = pytest.mark.skipif(
    _library.status().reason is not None, reason=f"{_library.status().reason}"
)


def bench(*arguments, before="", **environment):
    command = [sys.executable, "-W", "ignore", "-c", f"{PROGRAM}{before}main()", "bench"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)


def figures(folder):
    """What the only file in a folder holds."""
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("suite", "case"),
    [
        ("attention", "full-T63-D64"),
        ("attention", "causal-T77-D64"),
        ("relative", "xlnet-128x128"),
        ("norm", "add-dropout-1x768"),
        ("mlp", "mlp-1x384"),
        ("rotary", "interleaved-B1-H12-12-T77-D64"),
        ("embedding", "embedding-B1-T32-C384"),
        ("decode", "decode-B1-H12-12-S128-D64"),
    ],
)
def test_a_suite_runs(suite, case, tmp_path):
    options = ("--suite", suite, "--only", case, "--rounds", "1", "--output", str(tmp_path))
    done = bench(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = figures(tmp_path)
    assert [(r["case"], r["dtype"], r["step"]) for r in found["results"]] == [
        (case, dtype, step)
        for dtype in ("fp32", "bf16")
        for step in (("forward",) if suite == "decode" else ("forward", "backward"))
    ]
    for r in found["results"]:
        assert r["wrong"] is None and r["ratio"] > 0 and r["error"] > 0 and r["plain_error"] > 0
        assert r["timings"].keys() > {"ours"} and not r["unavailable"]
        assert r["memory"].keys() == r["timings"].keys()
        assert r["kind"] in done.stdout
    facts = found["conditions"]
    assert facts["torch"] == torch.__version__ and facts["commit"] and facts["threads"] == 1
    assert f"pinned to processor {facts['pinned'][0]}" in done.stdout
    assert facts["processor_share"] > 0


@needs_kernels
def test_the_optimizer_is_measured(tmp_path):
    options = ("--only", "200x", "--rounds", "1", "--output", str(tmp_path))
    done = bench("--suite", "optimizer", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = figures(tmp_path)["results"]
    assert [(r["dtype"], r["step"]) for r in found] == [
        (dtype, step) for dtype in ("fp32", "bf16") for step in ("step", "clipped")
    ]
    for r in found:
        assert r["wrong"] is None and r["backend"] == "cpu" and r["error"] > 0
        assert r["timings"].keys() == {"ours", "fused", "foreach", "for-loop"}


@needs_kernels
def test_a_wrong_step_is_not_timed(tmp_path):
    spoil = (
        "from fast_transformer import optim; right = optim.AdamW._scale; "
        "optim.AdamW._scale = lambda *a: 1.01 * right(*a); "
    )
    options = ("--only", "200x", "--dtype", "fp32", "--output", str(tmp_path))
    done = bench("--suite", "optimizer", *options, before=spoil)
    assert done.returncode == 1 and "WRONG, so not timed" in done.stdout
    assert all(r["wrong"] and not r["timings"] for r in figures(tmp_path)["results"])


@needs_kernels
def test_all_that_is_quick_is_measured_into_one_file(tmp_path):
    """But the models, which are another test's."""
    smaller = (
        "from fast_transformer.benchmarks import bench_models, suites; bench_models.MODELS = {}; "
        "import dataclasses; whole = suites.cases; suites.cases = lambda *a: whole(*a)[:1]; "
    )
    options = ("--quick", "--rounds", "1", "--dtype", "fp32", "--step", "forward")
    done = bench(*options, "--output", str(tmp_path), before=smaller)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "budget +3 µs" in done.stdout and "budget +9 µs" in done.stdout
    found = figures(tmp_path)
    assert {r["suite"] for r in found["results"]} == {*SUITES, "optimizer", "calls"}
    assert {x["what"] for x in found["roofline"]} == {"fp32", "bf16", "read", "copy", "streaming"}
    assert {x["isa"] for x in found["roofline"]} == {_library.status().isa}
    assert all(x["rate"] > 1e7 for x in found["roofline"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--suite", "bert"), "--suite is 'bert'; accepted are roofline, attention, relative, "),
        (("--suite", "mlp", "--dtype", "int8"), "--dtype is 'int8'; accepted are fp32, bf16, fp16"),
        (("--suite", "mlp", "--step", "up"), "--step is 'up'; accepted are forward, backward."),
        (("--suite", "mlp", "--threads", "9999"), "--threads is 9999; this process may use 1 to "),
    ],
)
def test_what_is_unknown_is_an_error(arguments, told, tmp_path):
    done = bench(*arguments, "--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(told) and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_answer_has_no_speed(tmp_path):
    spoil = (
        "from fast_transformer import backends, ops; right = ops.layer_norm; "
        "ops.layer_norm = lambda *a, **k: right(*a, **k) * (1 if backends.chosen() else 1.001); "
    )
    options = ("--suite", "norm", "--only", "norm-1x768", "--dtype", "fp32", "--rounds", "1")
    done = bench(*options, "--output", str(tmp_path), before=spoil)
    assert done.returncode == 1
    assert "WRONG, so not timed" in done.stdout
    (result,) = figures(tmp_path)["results"]
    assert result["wrong"] and not result["timings"] and "ratio" not in result


# ---- what is compared


def small(case):
    """The case on a shape of no consequence; what it computes stays."""
    if case.family == "attention":
        return dataclasses.replace(case, shape=(3, 2 * (case.kv_heads or 1), 33, 33, 16))
    if case.family == "relative":
        _, _, T, S, _ = case.shape
        return dataclasses.replace(case, shape=(2, 2, 33, 33 * S // T, 16))
    if case.family == "decode":
        B, H, KV, T, _, _ = case.shape
        return dataclasses.replace(case, shape=(min(B, 2), H, KV, T, 33, 16))
    if case.family == "rotary":
        return dataclasses.replace(case, shape=(2, 4, 2, 9, 40))
    if case.op == "qkv_projection":
        return dataclasses.replace(case, shape=(2, 9, 5, 4, 2, 6))
    return dataclasses.replace(case, shape=tuple(5 + i for i in range(len(case.shape))))


@pytest.mark.parametrize("suite", SUITES)
def test_peers_compute_the_same(suite):
    for case in map(small, SUITES[suite].CASES):
        if getattr(case, "dropout_p", 0) > 0:
            continue
        contest = SUITES[suite].contest(case, "fp32")
        ours = contest.ours.function(**contest.ours.inputs)
        for name, peer in contest.peers.items():
            if isinstance(peer, str):
                assert (name, peer) == ("sdpa", "SDPA has no softcap") and case.softcap > 0
                continue
            theirs = peer.function(**peer.inputs)
            if case.op == "attention_varlen":
                lengths = masks.lengths(contest.ours.inputs, "q")
                rows = theirs.transpose(1, 2)
                theirs = torch.cat([x[:n] for x, n in zip(rows, lengths, strict=True)])
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{case} {name}")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_told_the_same():
    """Uncompiled, which is slow and needs nothing."""
    from torch.nn.attention.flex_attention import flex_attention

    for case in map(small, bench_attention.CASES):
        peer = attention_peers.flex(case, case.inputs(torch.float32))
        if case.dropout_p > 0:
            assert peer == "flex_attention has no dropout"
        elif case.name.startswith("minilm") and case.padding != "varlen":
            theirs = flex_attention(**peer.inputs)
            ours = attention_peers.formula(
                **attention_peers.plain(case, case.inputs(torch.float32)).inputs
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{case}")


def test_causal_counts_half():
    full, causal = (
        bench_attention.contest(case, "fp32")
        for case in bench_attention.CASES
        if case.name in ("full-T128-D64", "causal-T128-D64")
    )
    assert causal.flops[0] / full.flops[0] == pytest.approx(129 / 256)


def test_every_kind_is_in_the_grid():
    kinds = {case.kind for case in bench_attention.CASES}
    assert kinds == {
        "full", "causal", "varlen", "padded", "bias", "bias-gradient", "dropout", "window", "alibi",
        "softcap", "gqa", "value-dim",
    }  # fmt: skip
    assert {case.kind for case in bench_relative.CASES} == {"xlnet", "transformer-xl", "distance"}
    assert {case.kind for case in bench_decode.CASES} == {
        "decode", "decode-gqa", "decode-tokens", "decode-paged",
    }  # fmt: skip
    lengths = {case.shape[2] for case in bench_attention.CASES + bench_attention.LONG}
    assert lengths >= {1, 77, 4096, 8192, 16384}
    quick = suites.cases("attention", suites.Options(quick=True))
    assert sorted(case.kind for case in quick) == sorted(kinds)
    few = suites.cases("attention", suites.Options(few=True))
    assert {case.kind for case in few} == kinds and len(few) == len(set(few))
    assert all(sum(case.kind == kind for case in few) <= suites.FEW for kind in kinds)
    assert [case.name for case in suites.spread(few, len(few))] == [case.name for case in few]
    assert not {c.name for c in bench_attention.LONG} & {c.name for c in bench_attention.CASES}


def test_what_float64_cannot_follow_is_judged_on_fewer_heads_and_rows():
    known = {case.name: case for case in bench_attention.CASES + bench_attention.LONG}
    assert bench_attention.judged(known["full-T333-D64"]) == known["full-T333-D64"]
    large = bench_attention.judged(known["bert-base-varlen-causal"])
    assert large.shape == (8, 2, 512, 512, 64) and large.causal and large.padding == "varlen"
    assert bench_attention.judged(known["causal-T16384-D64"]).shape == (1, 1, 256, 16384, 64)


def test_judged_heads_share_keys_as_in_the_case():
    known = {case.name: case for case in bench_attention.CASES}
    few = bench_attention.judged(known["bert-base-gqa"])
    assert (few.shape, few.kv_heads) == ((8, 3, 341, 512, 64), 1)
    few = bench_attention.judged(known["bert-base-mqa"])
    assert (few.shape, few.kv_heads) == ((8, 12, 85, 512, 64), 1)


def test_a_peer_that_cannot_run_says_why():
    def broken(x, weight, bias):
        raise NotImplementedError("no such kernel.\nAnd more.")

    case = testing.NormCase("norm-3x8", "bench", (3, 8))
    contest = bench_norm.contest(case, "fp32")
    peers = {"broken": Entry(broken, contest.ours.inputs, case.wrt), "absent": "it is not built"}
    contest = dataclasses.replace(contest, peers={**contest.peers, **peers})
    (result,) = compete("norm", contest, 1, ["forward"])
    reasons = {"broken": "NotImplementedError: no such kernel", "absent": "it is not built"}
    assert result.unavailable == reasons
    assert result.best == "pytorch" and result.timings.keys() == {"ours", "pytorch"}
    assert report.unavailable([result.figures()])[-1] == (
        "absent (forward) not available: it is not built, at 1 points"
    )


# ---- how it is measured


def test_peak_memory_is_what_a_call_touches(tmp_path):
    program = (
        "import torch; from fast_transformer.benchmarks.memory import one_arena, peak_memory; "
        "from fast_transformer.timing import steady; steady(1); one_arena(); "
        "call = lambda: torch.ones(8 << 18).add(1).sum(); call(); "
        "print([peak_memory(call) for _ in range(3)])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    for found in json.loads(done.stdout.replace("None", "null")):
        if found is None:
            pytest.skip("this system does not tell how much memory was used")
        assert 16 << 20 <= found < 17 << 20


def test_peak_memory_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        if memory.peak_memory(lambda: 1 / 0) is None:
            pytest.skip("this system does not tell how much memory was used")


def test_pinning_takes_as_many_processors_as_threads():
    program = (
        "import os; from fast_transformer.timing import pin; allowed = os.sched_getaffinity(0); "
        "pinned = pin(1); assert os.sched_getaffinity(0) == set(pinned) < allowed | {-1}; "
        "assert len(pinned) == 1"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
    with pytest.raises(ValueError, match="threads is 0; this process may use 1 to "):
        timing.pin(0)


def test_peaks(kernels):
    """The probes answer for every set, and a wider one is no slower than half the narrower."""
    from fast_transformer import _machine

    isas = _library.status().available
    flops = [_machine.peak_flops(isa, "float32") for isa in isas]
    assert all(better > worse / 2 for worse, better in zip(flops, flops[1:], strict=False))
    assert _machine.read_bandwidth(isas[-1], 1 << 14) > 1e8
    assert _machine.copy_bandwidth(isas[-1], 1 << 14) > 1e8
    assert all(_machine.streaming_bandwidth(isa, 1 << 14) > 1e7 for isa in isas)
    with pytest.raises(ValueError, match="isa is 'mmx'; accepted on this machine: "):
        _machine.peak_flops("mmx", "float32")
    with pytest.raises(ValueError, match="dtype is 'int8'; accepted: float32, bfloat16, float16"):
        _machine.peak_flops(isas[-1], "int8")


def test_roofline_goes_beyond_the_last_cache():
    sizes = roofline.sizes()
    assert sizes[0] == 4096 and all(b == 4 * a for a, b in zip(sizes, sizes[1:], strict=False))
    assert sizes[-1] > roofline.last_cache() or 4 * sizes[-1] > memory.available_memory() // 4


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
