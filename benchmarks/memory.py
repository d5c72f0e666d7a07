"""The most memory that a call holds above what was there before it, and what the machine has left.

Linux counts the resident pages of a process and remembers the highest count; writing 5 to
/proc/self/clear_refs forgets it (Documentation/filesystems/proc.rst). That sees every allocation,
torch's, the kernels' and those of the libraries below, and of each only what was touched.
"""

import ctypes
import platform
import threading
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"
M_ARENA_MAX = -8  # malloc.h


def one_arena() -> None:
    """Let every thread that starts from now on take memory from one pool.

    Freed memory that another pool keeps resident could be used again without being seen.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes at the peak of one call above those before it; None where Linux does not tell.

    It has run once before, so that what stays is there already. It runs in a thread of its own:
    working memory that a thread keeps from call to call then counts, as the call needs it. The
    kernel's counters are some hundred kilobytes coarse.
    """
    if platform.libc_ver()[0] != "glibc" or not CLEAR.exists():
        return None
    found, raised = [], []

    def run() -> None:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed pages go, so that their reuse is seen
            CLEAR.write_text(FORGET_PEAK)
            before = _resident("VmRSS")
            call()
            found.append(max(0, _resident("VmHWM") - before))
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def available_memory() -> int:
    """Bytes that Linux says a program may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no line MemAvailable")
