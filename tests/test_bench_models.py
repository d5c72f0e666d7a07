"""The races of whole models: small ones run them, and a wrong model is not timed."""

from functools import partial

import pytest
import torch

from fast_transformer.benchmarks import bench_encoders, bench_gpt2
from fast_transformer.benchmarks.races import Programme, Race, errors, objection

pytest.importorskip("transformers")
EVERYTHING = Programme("", ("fp32", "bf16"), full=False, compiled=False)


def tiny():
    return bench_gpt2.gpt2(2, n_embd=32, n_head=4, n_positions=128, vocab_size=101)


def test_gpt2(cpu, monkeypatch):
    monkeypatch.setattr(bench_gpt2, "NEW", 4)
    results = [r.run("models", 1) for r in bench_gpt2.races(tiny, "tiny", EVERYTHING)]
    assert [(r.kind, r.dtype) for r in results] == [
        (kind, dtype) for dtype in ("fp32", "bf16") for kind in ("decode", "training")
    ]
    for r in results:
        assert r.wrong is None and r.timings.keys() == {"ours", "pytorch"} == r.memory.keys()


def test_encoders(cpu, monkeypatch):
    monkeypatch.setattr(bench_encoders, "USUAL", ((8, 128),))
    build = partial(bench_encoders.bert, 48, 1)
    results = [r.run("models", 1) for r in bench_encoders.races(build, "tiny", EVERYTHING)]
    assert {r.kind for r in results} == {"inference", "training"}
    for r in results:
        assert r.wrong is None and r.timings.keys() >= {"ours", "pytorch"}
        peers = {"onnxruntime", "openvino", "ctranslate2"}
        assert r.kind == "training" or peers <= {*r.timings, *r.unavailable}


def test_a_wrong_model_is_not_timed(cpu, monkeypatch):
    accelerate = bench_gpt2.ft.accelerate

    def spoilt(model):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight.mul_(1.1)
        return accelerate(model)

    monkeypatch.setattr(bench_gpt2.ft, "accelerate", spoilt)
    for race in bench_gpt2.races(tiny, "tiny", Programme("", ("fp32",), False, False)):
        result = race.run("models", 1)
        assert "off by" in result.wrong and not result.timings


def test_a_peer_that_fails_is_named():
    def fails():
        raise ValueError("no such thing.\nmore")

    race = Race("x", "decode", "fp32", "", {"ours": lambda: 0, "pytorch": lambda: 0, "it": fails})
    result = race.run("models", 1)
    assert result.unavailable == {"it": "ValueError: no such thing"}
    assert result.timings.keys() == {"ours", "pytorch"}


def test_errors():
    truth = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1e-9])}
    off = {"a": torch.tensor([1.0, 2.2]), "b": torch.tensor([1e-6])}
    assert errors(off, truth, truth) == (pytest.approx(0.1), 0.0)
    assert objection(0.3, 0.1, 0.05) and not objection(0.2, 0.1, 0.05)
    assert objection(float("nan"), 0.1, 0.1)
