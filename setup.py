"""Builds the native parts of fast_transformer; everything that is plain data is in pyproject.toml.

    fast_transformer/_cpu_<isa>.so    csrc/cpu/*.cpp, once for every instruction set, free of torch
    fast_transformer/_C.so            csrc/bind/*.cpp, over torch's stable ABI
    fast_transformer/_machine.*.so    csrc/machine/*.cpp, over pybind11, free of torch

Environment:
    CXX                       the C++ compiler (default: the first of c++, g++, clang++)
    FAST_TRANSFORMER_BUILD    0 installs Python alone, 1 fails where there is no compiler
    FAST_TRANSFORMER_SANITIZE e.g. address,undefined: a debug build with these sanitizers
    FAST_TRANSFORMER_ISAS     e.g. avx2,avx512: build these sets alone (default: all)
    MAX_JOBS                  compilers that run at once (default: one a processor)
"""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]

# The instruction sets of each architecture, worst first: name -> compiler flags.
# A new one is a row here and a row in csrc/machine/features.cpp: what a processor must have.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {
        "neon": [],
    },
}

# -fno-gnu-unique, hidden symbols: the sets share template names, and the loader must never unify
# them. Sums are contracted to FMA but never reordered, and NaN and infinity keep their meaning.
COMMON = [
    *("-std=c++20", "-O3", "-g0", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi"),
    "-Wno-maybe-uninitialized",  # GCC 12 finds that in its own AVX-512 header
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-gnu-unique"),
]
CPU = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]  # torch 2.10
OLDEST_TORCH = "2.10"

NOT_BUILT = (
    "fast_transformer: installing without the CPU kernels, because {}; "
    "every op will run on its plain PyTorch reference."
)


def find_torch():
    """The folder of the installed torch, seen through pip's build isolation and never imported."""
    paths = sysconfig.get_paths()
    for folder in [*sys.path, paths["platlib"], paths["purelib"], site.getusersitepackages()]:
        if Path(folder, "torch/include/torch/csrc/stable/library.h").exists():
            return Path(folder, "torch")
    return None


def find_compiler():
    """(compiler, None), or (None, the reason why nothing is compiled)."""
    wish = os.environ.get("FAST_TRANSFORMER_BUILD", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FAST_TRANSFORMER_BUILD is {wish!r}; accepted are 0, 1 and nothing.")
    if wish == "0":
        return None, "FAST_TRANSFORMER_BUILD=0"
    if sys.platform != "linux" or platform.machine() not in INSTRUCTION_SETS:
        reason = f"they exist for Linux on {' and '.join(INSTRUCTION_SETS)} only"
    else:
        named = os.environ.get("CXX")
        for name in [named] if named else ["c++", "g++", "clang++"]:
            if shutil.which(name.split()[0]):
                return name, None
        if named:
            raise SystemExit(f"CXX is {named!r}, and there is no such compiler.")
        reason = "there is no C++ compiler (c++, g++, clang++)"
    if wish == "1":
        raise SystemExit(f"FAST_TRANSFORMER_BUILD=1, but {reason}.")
    return None, reason


def instruction_sets():
    """The ones to build: name -> compiler flags."""
    known = INSTRUCTION_SETS[platform.machine()]
    names = os.environ.get("FAST_TRANSFORMER_ISAS", "")
    wanted = names.split(",") if names else list(known)
    if not known.keys() >= set(wanted):
        raise SystemExit(f"FAST_TRANSFORMER_ISAS is {names!r}; accepted: {', '.join(known)}.")
    return {name: flags for name, flags in known.items() if name in wanted}


def write_if_changed(path, text):
    """Leave the file's date alone where its text stays."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class Ninja:
    """A build.ninja in the making, and the run of it: what did not change is not rebuilt."""

    def __init__(self, compiler, sanitize):
        # Inside the tree even for an editable install, whose own folders are temporary.
        names = ["native", sysconfig.get_platform(), sys.implementation.cache_tag, sanitize]
        self.folder = Path("build", "-".join(filter(None, names)).replace(",", "-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.compiler = compiler
        self.flags = [flag for flag in COMMON if self.accepts([flag])]
        self.link_flags, self.complete = [], ["-Wl,--no-undefined"]
        if sanitize:  # whose symbols the process brings along
            self.complete = []
            self.flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g1", "-O1"]
            self.link_flags += [f"-fsanitize={sanitize}"]
        self.lines = [
            f"builddir = {self.folder}",
            "rule compile",
            f"  command = {compiler} -MD -MF $out.d $flags -c $in -o $out",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared $in -o $out $flags",
            "  description = $out",
        ]

    def accepts(self, flags):
        """Whether the compiler knows these flags."""
        command = [*self.compiler.split(), *flags, "-x", "c++", "-E", "/dev/null"]
        return subprocess.run(command, capture_output=True).returncode == 0

    def library(self, name, folder, flags, link_flags=(), exports=""):
        """Build every .cpp in `folder` into one; `exports`, if any, is its only visible symbol."""
        script = self.folder / f"{name}.map"
        write_if_changed(script, f"{{ {exports and f'global: {exports}; '}local: *; }};\n")
        link_flags = [f"-Wl,--version-script={script}", *self.link_flags, *link_flags]
        objects = []
        for source in sorted(Path(folder).glob("*.cpp")):
            objects.append(f"{self.folder}/{name}/{source.stem}.o")
            self.lines.append(f"build {objects[-1]}: compile {source}")
            self.lines.append(f"  flags = {' '.join([*self.flags, *flags])}")
        output = self.folder / f"{name}.so"
        self.lines.append(f"build {output}: link {' '.join(objects)} | {script}")
        self.lines.append(f"  flags = {' '.join(link_flags)}")
        return output

    def run(self):
        """Build what changed, in parallel, with one line of progress on a terminal."""
        file = self.folder / "build.ninja"
        file.write_text("\n".join([*self.lines, ""]))
        jobs = os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))
        status = {"NINJA_STATUS": "fast_transformer [%f/%t, %e s] "}
        start = time.monotonic()
        command = [sys.executable, "-m", "ninja", "-f", str(file), "-j", str(jobs)]
        if subprocess.run(command, env={**os.environ, **status}).returncode != 0:
            raise CompileError("fast_transformer: the native code did not compile; see above.")
        seconds = time.monotonic() - start
        print(f"fast_transformer: native code built in {seconds:.1f} s", flush=True)


def operators(ninja):
    """_C.so: the operators, over torch's stable ABI."""
    torch = find_torch()
    if torch is None:
        raise CompileError(f"fast_transformer: building needs torch>={OLDEST_TORCH} installed.")
    flags = [*STABLE_ABI, f"-isystem '{torch}/include'"]
    link = [f"-L'{torch}/lib'", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-ldl"]
    link += ninja.complete
    return ninja.library("_C", "csrc/bind", flags, link)


def machine(ninja):
    """_machine: an extension module over pybind11."""
    import pybind11

    version = (find_torch() / "version.py").read_text()
    facts = {
        "FLAGS": " ".join([*ninja.flags, *CPU]),
        "TORCH": re.search(r"__version__ = '(.+?)'", version)[1],
    }
    flags = [f"""'-DFT_BUILD_{key}="{value}"'""" for key, value in facts.items()]
    for folder in pybind11.get_include(), sysconfig.get_path("include"):
        flags.append(f"-isystem '{folder}'")
    return ninja.library("_machine", "csrc/machine", flags, ["-ldl"], "PyInit__machine")


def kernels(ninja, isa, isa_flags):
    """_cpu_<isa>.so: all kernels for one instruction set."""
    flags = [*CPU, *isa_flags, f"-DFT_ISA={isa}", f"-DFT_ISA_{isa.upper()}"]
    return ninja.library(f"_cpu_{isa}", "csrc/cpu", flags, ninja.complete, "ft_cpu_kernels")


class BuildNative(build_ext):
    """Compiles with ninja and hands the libraries to setuptools."""

    def get_ext_filename(self, fullname):
        """Only _machine belongs to one version of Python; there is no Python in the others."""
        filename = super().get_ext_filename(fullname)
        if fullname.endswith("_machine"):
            return filename
        return filename.split(".")[0] + ".so"

    def build_extensions(self):
        """Build every library; ninja knows what is stale."""
        ninja = Ninja(COMPILER, os.environ.get("FAST_TRANSFORMER_SANITIZE", ""))
        built = {"_C": operators(ninja), "_machine": machine(ninja)}
        for isa, isa_flags in instruction_sets().items():
            if ninja.accepts(isa_flags):
                built[f"_cpu_{isa}"] = kernels(ninja, isa, isa_flags)
            else:
                print(f"fast_transformer: leaving out {isa}, which {COMPILER} cannot compile for")
        ninja.run()
        self.extensions = [e for e in self.extensions if e.name.split(".")[-1] in built]
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # put in place whole: a process that has the old one loaded keeps it
            fresh = target.with_name(target.name + ".new")
            shutil.copy2(built[extension.name.split(".")[-1]], fresh)
            os.replace(fresh, target)


class BuildPython(build_py):
    """Starts from an empty folder, so that no deleted file stays in a wheel."""

    def run(self):
        """Copy the Python files, and say where they come alone."""
        if Path(self.build_lib).resolve().parent == Path("build").resolve():
            shutil.rmtree(self.build_lib, ignore_errors=True)
        if not COMPILER:
            print(NOT_BUILT.format(WHY_NOT), file=sys.stderr, flush=True)
        super().run()


COMPILER, WHY_NOT = find_compiler()
LIBRARIES = []
if COMPILER:
    LIBRARIES = [*(f"_cpu_{isa}" for isa in instruction_sets()), "_C", "_machine"]

# Folders at the top of the tree that are parts of the package.
ROOMS = {f"fast_transformer.{name}": name for name in ("kernels", "benchmarks")}

setup(
    packages=[*find_packages(include=["fast_transformer*"]), *ROOMS],
    package_dir=ROOMS,
    ext_modules=[Extension(f"fast_transformer.{name}", []) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    # Not in pyproject.toml: build isolation would then download gigabytes, even beside a torch.
    setup_requires=[f"torch>={OLDEST_TORCH}"] if COMPILER and not find_torch() else [],
)
