"""Loads the native code: the operators in _C.so and the best _cpu_<isa>.so this processor can run.

A build without native code, or one that does not load, is no error here: `status().reason` says in
one sentence what is missing, and the backends that need it answer with that sentence.
"""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OLDEST_TORCH = (2, 10)
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Status:
    """What was loaded.

    isa: the instruction set that the CPU kernels run on.
    available: every instruction set that both this build and this processor have, best last.
    reason: where nothing was loaded, why.
    build: compiler, flags and torch of the build.
    """

    loaded: bool = False
    isa: str | None = None
    available: tuple[str, ...] = ()
    reason: str | None = None
    build: dict[str, Any] = field(default_factory=dict)


def require_torch(version: str) -> None:
    """Raise ImportError where torch is too old to have the symbols that _C.so needs."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"fast_transformer needs torch {oldest} or later, but torch {version} is installed."
        )


def choose_isa(available: tuple[str, ...], cap: str | None) -> str:
    """Pick the best instruction set, or the one that FAST_TRANSFORMER_ISA names."""
    if not cap:
        return available[-1]
    if cap not in available:
        raise ValueError(
            f"FAST_TRANSFORMER_ISA is {cap!r}; accepted on this machine: {', '.join(available)}."
        )
    return cap


def _load() -> Status:
    if not (FOLDER / "_C.so").exists():
        return Status(
            reason="the CPU kernels were not built (no C++ compiler at installation, or "
            "FAST_TRANSFORMER_BUILD=0); `pip install` it again with one to have them"
        )
    try:
        from fast_transformer import _machine
    except ImportError as error:  # an editable build of another Python, or a broken file
        return Status(reason=f"fast_transformer._machine does not load: {error}")
    available = tuple(
        isa for isa in _machine.supported_isas() if (FOLDER / f"_cpu_{isa}.so").exists()
    )
    if not available:
        return Status(reason="no instruction set of this build runs on this processor")
    isa = choose_isa(available, os.environ.get("FAST_TRANSFORMER_ISA"))
    try:
        torch.ops.load_library(str(FOLDER / "_C.so"))  # type: ignore[no-untyped-call]
        torch.ops.fast_transformer.load_kernels(str(FOLDER / f"_cpu_{isa}.so"))
    except (OSError, RuntimeError) as error:
        return Status(available=available, reason=f"the CPU kernels do not load: {error}")
    return Status(True, isa, available, None, _machine.build_facts())


def status() -> Status:
    """What was loaded when fast_transformer was imported."""
    return _STATUS


require_torch(torch.__version__)
_STATUS = _load()
if not _STATUS.loaded:
    warnings.warn(f"fast_transformer: {_STATUS.reason}.", RuntimeWarning, stacklevel=2)
