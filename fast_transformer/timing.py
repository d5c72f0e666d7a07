"""How this project times: side by side in one process, in a shuffled order, on a steady allocator.

Two functions measured one after the other meet different clocks, caches and page tables; here each
round calls every one of them once, in a new random order, and the figures are medians over rounds.
Beside a figure stands what the processor can do at best. The demo and the benchmarks use this file.
"""

import ctypes
import functools
import gc
import os
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from fast_transformer.env import env

Name = TypeVar("Name")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one measurement for every round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / self.median


def steady(threads: int | None = None) -> None:
    """Let freed memory stay with the process, and fix torch's number of threads.

    glibc hands large blocks back to the system and takes them anew, page fault by page fault, at
    sizes that depend on what was freed before: identical code has measured a factor of two apart.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pin(threads: int) -> tuple[int, ...]:
    """Bind this process to as many processors as threads, and return them.

    Each is on a core of its own while there are cores, and the last come first: the first of a
    machine serves most of its interrupts. Before torch runs anything in parallel: the threads of
    its pool stay where the thread that makes them may run. ValueError where processors are too few.
    """
    allowed = sorted(os.sched_getaffinity(0), reverse=True)
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"threads is {threads}; this process may use 1 to {len(allowed)}.")
    met: Counter[str] = Counter()
    place = {}  # of a processor within its core
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        place[cpu] = met[core]
        met[core] += 1
    chosen = tuple(sorted(allowed, key=lambda cpu: place[cpu])[:threads])
    os.sched_setaffinity(0, chosen)
    return chosen


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int = 9,
    seconds: float = 0.0,
    tick: Callable[[], object] = lambda: None,
) -> dict[Name, Timing]:
    """Time every call in every round and return the measurements by name.

    seconds: a measurement repeats its call until about this much time has passed. tick: called
    after each measurement, warm-up included, `measurements(calls, rounds)` times in all.
    """
    number = {}
    for name, call in calls.items():  # once to warm up, once to see how long it takes
        call()
        number[name] = max(1, round(seconds / max(_measure(call, 1), 1e-7)))
        tick()
    found: dict[Name, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                found[name].append(_measure(calls[name], number[name]))
                tick()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(times)) for name, times in found.items()}


def measurements(calls: Mapping[Name, object], rounds: int) -> int:
    """How often `interleaved` calls its `tick`."""
    return len(calls) * (rounds + 1)


def _measure(call: Callable[[], object], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


@functools.cache
def peak_flops(dtype: torch.dtype) -> float | None:
    """FLOP/s that one core's registers allow the kernels; None without kernels."""
    isa = env()["isa"]
    if isa is None:
        return None
    from fast_transformer import _machine

    return _machine.peak_flops(str(isa), str(dtype).removeprefix("torch."))


@functools.cache
def copy_rate(size: int) -> float | None:
    """Bytes a second that one core reads and writes within `size` bytes; None without kernels."""
    isa = env()["isa"]
    if isa is None:
        return None
    from fast_transformer import _machine

    return _machine.copy_bandwidth(str(isa), size)


@functools.cache
def read_rate(size: int) -> float | None:
    """Bytes a second that one core reads within `size` bytes; None without kernels."""
    isa = env()["isa"]
    if isa is None:
        return None
    from fast_transformer import _machine

    return _machine.read_bandwidth(str(isa), size)


def conditions() -> dict[str, Any]:
    """What a reader of a figure has to know: the processor, the versions, the time."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        **env(),
    }


def processor() -> str:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
