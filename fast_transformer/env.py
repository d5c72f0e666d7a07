"""What this installation is made of: versions, instruction set, backends, threads."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fast_transformer import _library, backends

try:
    __version__ = version("fast-transformer")
except PackageNotFoundError:  # a source tree that nobody installed
    __version__ = "0+unknown"


def env() -> dict[str, Any]:
    """Return what a bug report needs: versions, instruction sets, backends, threads, the build.

    "isa" is the instruction set in use, "isas" those to choose from by FAST_TRANSFORMER_ISA.
    "backends" maps each name to "available" or to the reason why it is not.
    """
    native = _library.status()
    return {
        "fast_transformer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa": native.isa,
        "isas": native.available,
        "backends": {
            "cuda": "not implemented yet",
            "triton": _triton(),
            "cpu": native.reason or "available",
            "reference": "available",
        },
        "forced_backend": backends.chosen(),
        "threads": torch.get_num_threads(),
        "build": native.build,
    }


def _triton() -> str:
    installed = importlib.util.find_spec("triton") is not None
    return "not implemented yet" + ("" if installed else ", and triton is not installed")
