"""The smoke selection again, on every instruction set of this machine that is not the best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_transformer import _library

STATUS = _library.status()


@pytest.mark.parametrize("isa", [isa for isa in STATUS.available if isa != STATUS.isa])
def test_smoke(isa):
    """One process a set: a process loads one, and keeps it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "smoke", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "FAST_TRANSFORMER_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
