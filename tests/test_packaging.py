"""What is built and how it is installed: symbols, sdist, wheel, and the errors on the way."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from fast_transformer import _library

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "fast_transformer", "kernels", "tests", "benchmarks", "docs", "examples")
SITE = Path(torch.__file__).parents[1]
EXTENSION = "_machine" + sysconfig.get_config_var("EXT_SUFFIX")  # of this Python, not of another
NATIVE = [*sorted(_library.FOLDER.glob("_cpu_*.so")), *_library.FOLDER.glob("_C.so")]
NATIVE += [_library.FOLDER / EXTENSION] if NATIVE else []
IN_TREE = (ROOT / "setup.py").exists()
needs_source = pytest.mark.skipif(not IN_TREE, reason="the tests lie apart from the source tree")

RUN_AN_OP = """
import fast_transformer as ft, torch
x = torch.randn(3, 17, requires_grad=True)
with ft.backend("cpu"):
    y = ft.layer_norm(x)
    y.square().sum().backward()
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (17,)))
assert x.grad.abs().sum() > 0
print(ft.__file__, ft.env()["isa"])
"""

TYPED_PROGRAM = """
import torch
import fast_transformer as ft
from fast_transformer import _machine

x: torch.Tensor = ft.layer_norm(torch.ones(2, 8), eps=1e-6)
with ft.backend("reference"):
    x = ft.mlp(x, torch.ones(4, 8), None, torch.ones(8, 4), None, activation="relu")
facts: dict[str, object] = ft.env()
names: list[str] = _machine.supported_isas()
rate: float = _machine.peak_flops(names[0], "float32")
"""


def python(code, *, executable=sys.executable, cwd, **environment):
    """Run Python code in a process of its own, away from the source tree."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    command = [str(executable), "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def setup(*arguments, cwd, check=True, **environment):
    """Run setup.py."""
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def build_wheel(source, folder, **environment):
    """Build a wheel as pip does, with the build requirements that are installed."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-index", "-w", str(folder), str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def empty_environment(folder, wheel):
    """Install a wheel into a new environment that has torch, and nothing else that we know of."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # A path alone: .pth files that lie in SITE, such as an editable install's, are not read.
    Path(purelib, "torch.pth").write_text(f"{SITE}\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    done = subprocess.run(
        [*command, "--no-deps", "--ignore-installed", str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree: its own folders alone, since an environment may lie in it."""
    folder = tmp_path_factory.mktemp("tree") / "source"
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=built)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    setup("-q", "sdist", "-d", str(folder), cwd=source, FAST_TRANSFORMER_BUILD="0")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(kernels, tmp_path_factory):
    """The wheel of this source tree; its native code is compiled only where it is stale."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of an environment that has the wheel, and torch."""
    return empty_environment(tmp_path_factory.mktemp("installed") / "venv", wheel)


# ---- the libraries


def exported(library):
    """The names that other libraries could see."""
    command = ["nm", "-D", "--defined-only", "--format=posix", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0] for line in lines}


@pytest.mark.parametrize("library", NATIVE, ids=lambda path: path.name.split(".")[0])
def test_each_library_exports_only_its_entry(library):
    """Two instruction sets' copies of one template must never meet in the loader."""
    expected = {"_C": set(), "_machine": {"PyInit__machine"}}
    assert exported(library) == expected.get(library.name.split(".")[0], {"ft_cpu_kernels"})


@pytest.mark.parametrize("library", NATIVE, ids=lambda path: path.name.split(".")[0])
def test_only_the_operators_need_torch(library):
    """No search path of the machine it was built on, no Python in what every Python loads."""
    command = ["readelf", "-d", str(library)]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libpython" not in dynamic
    assert ("libtorch" in dynamic) == (library.name == "_C.so")


@needs_source
def test_torch_is_included_by_the_bindings_alone():
    """The kernels compile anywhere, and the bindings over the stable ABI only."""
    stable = re.compile(r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/")
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text()):
            if re.match(r"(torch|ATen|c10)/", header):
                assert path.parent.name == "bind" and stable.match(header), (path.name, header)


@needs_source
def test_flags_keep_to_the_named_instruction_sets():
    """Neither the building machine's own set nor arithmetic that gives up NaN and order."""
    for name in ("setup.py", "Makefile", "pyproject.toml"):
        assert not re.search(r"-march=native|-mtune=native|-ffast-math", (ROOT / name).read_text())


# ---- the choice of an instruction set


@pytest.mark.parametrize("isa", _library.status().available)
def test_cap(isa, tmp_path):
    """FAST_TRANSFORMER_ISA chooses any set that the machine has, and ops run on it."""
    done = python(RUN_AN_OP, cwd=tmp_path, FAST_TRANSFORMER_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == isa


def test_unknown_cap_lists_what_is_accepted(kernels, tmp_path):
    done = python("import fast_transformer", cwd=tmp_path, FAST_TRANSFORMER_ISA="mmx")
    accepted = ", ".join(_library.status().available)
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: FAST_TRANSFORMER_ISA is 'mmx'; accepted on this machine: {accepted}."
    )


def test_sets_are_supported_in_order(kernels):
    from fast_transformer import _machine

    supported = _machine.supported_isas()
    assert [isa for isa in supported if isa in _library.status().available] == list(
        _library.status().available
    )
    if "avx512" in supported:
        assert "avx2" in supported and "avx512f" in _machine.cpu_features()


# ---- what a user may be missing


def test_old_torch_gives_one_sentence(tmp_path):
    """And gives it before anything looks for a symbol that torch does not have."""
    code = """
import sys, types
sys.modules["torch"] = torch = types.ModuleType("torch")
torch.__version__ = "2.9.1+cpu"
import fast_transformer
"""
    done = python(code, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fast_transformer needs torch 2.10 or later, but torch 2.9.1+cpu is installed."
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.15.0a0+gitabc", "3.0"])
def test_later_torch_is_taken(version):
    _library.require_torch(version)


@needs_source
def test_stray_kernels_explains_itself(tmp_path):
    """The source tree's folder is no package called kernels."""
    code = f"import fast_transformer.kernels, sys; sys.path.insert(0, {str(ROOT)!r})"
    done = python(f"{code}; import kernels; kernels.attention", cwd=tmp_path)
    assert "imported as fast_transformer.kernels, not as kernels" in done.stderr.splitlines()[-1]


@needs_source
def test_no_compiler_installs_python_alone(sdist, tmp_path):
    """With one sentence at the build, one at the import, and every op on the reference."""
    done = setup("build", cwd=sdist, PATH=str(tmp_path), FAST_TRANSFORMER_BUILD="")
    told = [line for line in done.stderr.splitlines() if "without the CPU kernels" in line]
    assert len(told) == 1 and "there is no C++ compiler" in told[0]

    wheel = build_wheel(sdist, tmp_path, FAST_TRANSFORMER_BUILD="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    executable = empty_environment(tmp_path / "venv", wheel)
    code = """
import fast_transformer as ft, torch
import fast_transformer.kernels
x = torch.randn(3, 17)
torch.testing.assert_close(ft.layer_norm(x), torch.nn.functional.layer_norm(x, (17,)))
print(ft.env()["backends"]["cpu"])
"""
    done = python(code, executable=executable, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "were not built" in done.stdout
    assert (
        done.stderr.count("RuntimeWarning: fast_transformer: the CPU kernels were not built") == 1
    )


@needs_source
def test_no_compiler_where_one_is_demanded(source):
    done = setup("build", cwd=source, check=False, PATH="/nonexistent", FAST_TRANSFORMER_BUILD="1")
    assert done.returncode != 0
    assert "FAST_TRANSFORMER_BUILD=1, but there is no C++ compiler" in done.stderr
    done = setup("build", cwd=source, check=False, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "CXX is 'no-such-compiler', and there is no such compiler." in done.stderr


@needs_source
def test_broken_source_fails_loudly(source, tmp_path):
    """A compiler that refuses a file is no reason to install without kernels."""
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    for path in (broken / "csrc/bind").glob("*.cpp"):
        path.write_text("#error broken on purpose\n")
    done = setup("build_ext", cwd=broken, check=False, MAX_JOBS="1")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert "the native code did not compile" in done.stderr


# ---- sdist and wheel


@needs_source
def test_sdist_is_complete(source, sdist):
    """Headers need MANIFEST.in to get there, and whoever packages us wants the tests."""
    files = [path for name in SOURCES for path in (source / name).rglob("*") if path.is_file()]
    files += [source / name for name in ("LICENSE", "README.md", "setup.py", "pyproject.toml")]
    assert len([path for path in files if path.suffix == ".h"]) > 10
    missing = [path for path in files if not (sdist / path.relative_to(source)).exists()]
    assert not missing
    assert not list(sdist.rglob("*.so"))


@needs_source
def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "fast_transformer"
    }
    assert {Path(name).name for name in names if name.endswith(".so")} == {
        library.name for library in NATIVE
    }
    assert "fast_transformer/kernels/__init__.py" in names
    assert "fast_transformer/benchmarks/suites.py" in names
    assert {"fast_transformer/py.typed", "fast_transformer/_machine.pyi"} <= set(names)


@needs_source
def test_wheel_in_an_empty_environment(installed, tmp_path):
    """It imports from there, runs an op forward and backward, and has its command."""
    done = python(RUN_AN_OP, executable=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, isa = done.stdout.split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert isa == _library.status().isa
    assert (installed.parent / "fast-transformer").exists()


@needs_source
def test_the_wheel_brings_the_benchmarks(installed, tmp_path):
    """They run from there, and claim no commit of the tree that they happen to lie in."""
    pytest.importorskip("typer")
    command = [installed.parent / "fast-transformer", "bench", "--suite", "norm", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--only", "norm-1x768"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "fast-transformer-bench").glob("norm-*.json")
    assert json.loads(file.read_text())["conditions"]["commit"] == "unknown"


@needs_source
def test_a_users_type_checker_reads_the_wheel(installed, tmp_path):
    """py.typed and the extension's stub are there, and what they say is what the code does."""
    program = tmp_path / "program.py"
    program.write_text(TYPED_PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, "--python-executable", str(installed), str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert python(TYPED_PROGRAM, executable=installed, cwd=tmp_path).returncode == 0


@needs_source
@pytest.mark.full
def test_wheel_from_the_sdist(kernels, sdist, tmp_path):
    """Nothing that the native build needs stays behind in the source tree."""
    wheel = build_wheel(sdist, tmp_path)
    executable = empty_environment(tmp_path / "venv", wheel)
    done = python(RUN_AN_OP, executable=executable, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@needs_source
@pytest.mark.full
def test_sanitized(kernels, source, tmp_path):
    """The smoke selection, in a build that AddressSanitizer and UBSan watch."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    isa = _library.status().available[-1]
    build = {"FAST_TRANSFORMER_SANITIZE": "address,undefined", "FAST_TRANSFORMER_ISAS": isa}
    sanitized = tmp_path / "source"
    shutil.copytree(source, sanitized)
    setup("-q", "build_ext", "--inplace", cwd=sanitized, **build)
    watch = {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(sanitized),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "smoke", "-p", "no:cacheprovider"],
        cwd=sanitized,
        env={**os.environ, **watch},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
