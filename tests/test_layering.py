"""The house: who may import whom, what a plain import loads, and how long a file may be."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fast_transformer as ft

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fast_transformer"
LONGEST = 400

# A layer imports from those below it in this table and from itself, never from those above.
LAYERS = [
    {"cli"},
    {"benchmarks"},
    {"training", "generation"},
    {"models"},
    {"integrations", "compat"},
    {"nn"},
    {"optim"},
    {"testing"},
    {"decode_cases", "embedding_cases", "loss_cases", "projection_cases", "rotary_cases"},
    {"accuracy", "attention_cases", "timing"},
    {"ops"},
    {"env"},
    {"reference", "kernels", "backends"},
    {"_library"},
    {"_machine"},
]
# Folders at the top of the tree that are installed as parts of the package.
ROOMS = ("kernels", "benchmarks")
# Of other people's packages, torch is everybody's; these are for the layers named.
GUESTS = {
    "transformers": {"cli", "benchmarks", "integrations", "models", "training"},
    "tokenizers": {"cli", "training"},
    "safetensors": {"cli", "models", "training"},
    "typer": {"cli"},
    "rich": {"cli", "training"},
    "matplotlib": {"cli", "benchmarks"},
    "pytest": {"benchmarks"},
    "triton": {"kernels"},
}


def layer_of(name):
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


def imports(path):
    """(absolute module name, line) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole module name"
            if node.module == "fast_transformer":
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def sources(folder, pattern):
    return sorted(path for path in folder.rglob(pattern) if "__pycache__" not in path.parts)


LAYERED = [path for folder in (PACKAGE, *(ROOT / room for room in ROOMS)) for path in
           sources(folder, "*.py")]  # fmt: skip


@pytest.mark.parametrize("path", LAYERED, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    folder, *rest = path.relative_to(ROOT).parts
    own = folder if folder in ROOMS else rest[0].removesuffix(".py")
    if own == "__init__":  # the shop window shows everything
        return
    layer = layer_of(own)
    for module, line in imports(path):
        top, *rest = module.split(".")
        where = f"{path.relative_to(ROOT)}:{line}: {own} imports {module}"
        if top in GUESTS:
            assert own in GUESTS[top], f"{where}, which is for {sorted(GUESTS[top])}"
        if top != "fast_transformer" or not rest:
            continue
        other = layer_of(rest[0])
        if rest[0] == own:
            continue
        assert layer is not None, f"{own} has no layer: give it one above"
        assert other is not None, f"{where}, which has no layer"
        assert layer < other, f"{where}, which lies above it"


@pytest.mark.parametrize("path", sources(ROOT / "kernels", "*.py"), ids=lambda path: path.name)
def test_kernels_know_no_module(path):
    for module, line in imports(path):
        known = not module.startswith("fast_transformer") or "kernels" in module
        assert known, f"{path.name}:{line}: kernels import {module}"


TORCH_FREE = [path for name in ("common", "cpu", "machine") for path in
              sources(ROOT / "csrc" / name, "*.*")]  # fmt: skip


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_in_cpp_know_no_torch(path):
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("#include"):
            assert "torch" not in line and "ATen" not in line and "c10" not in line, line


@pytest.mark.parametrize("path", sources(ROOT / "csrc" / "bind", "*.*"), ids=lambda path: path.name)
def test_bindings_keep_to_the_stable_abi(path):
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("#include") and "torch" in line.split("//")[0]:
            assert "torch/csrc/stable" in line or "torch/headeronly" in line or "aoti" in line, line


def test_files_are_short():
    folders = ("fast_transformer", "tests", "benchmarks", "kernels", "csrc", "examples")
    patterns = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    paths = [p for name in folders for pattern in patterns for p in sources(ROOT / name, pattern)]
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in paths}
    long = {str(path): length for path, length in lengths.items() if length > LONGEST}
    assert not long, f"over {LONGEST} lines: {long}"


def test_no_room_for_leftovers():
    banned = {"utils", "util", "helpers", "helper", "misc", "common_utils"}
    names = [path for path in sources(PACKAGE, "*") if path.stem in banned]
    assert not names


def test_public_functions_are_annotated():
    """Whole, so that a strict caller sees no untyped call."""
    for name in ft.__all__:
        if inspect.isfunction(function := getattr(ft, name, None)):
            signature = inspect.signature(function)
            hints = [*(p.annotation for p in signature.parameters.values())]
            assert inspect.Signature.empty not in [*hints, signature.return_annotation], name
            assert function.__doc__, name


def test_import_needs_torch_alone():
    """And says so in the time it takes: under a tenth of a second more."""
    program = (
        "import sys, time, torch\n"
        "before, start = set(sys.modules), time.perf_counter()\n"
        "import fast_transformer\n"
        "taken = time.perf_counter() - start\n"
        "top = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(top & {'transformers', 'typer', 'rich', 'matplotlib', 'triton', 'numpy',\n"
        "  'hypothesis', 'pytest', 'safetensors', 'tokenizers'}), 'torch._dynamo' in sys.modules)\n"
        "print(taken)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    found, taken = done.stdout.splitlines()
    assert found == "[] False"
    assert float(taken) < 0.5  # on a busy machine
