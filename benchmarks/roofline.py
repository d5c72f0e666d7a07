"""The limits of this machine: what each instruction set can multiply, and what memory moves.

Arithmetic on registers alone, and buffers of every size read, copied, and copied by stores that go
past the caches (csrc/cpu/peak.cpp). All threads at once, since cores share caches and memory.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fast_transformer import _library
from fast_transformer.benchmarks.memory import available_memory

SUITE = "roofline"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MOVES = ("read", "copy", "streaming")
SMALLEST = 4 << 10
CACHE_UNKNOWN = 32 << 20


@dataclass(frozen=True)
class Limit:
    """One rate: FLOP/s at a dtype ("fp32", "bf16"), or bytes a second of a move within `bytes`."""

    isa: str
    what: str
    bytes: int | None
    rate: float

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self)


def measure(threads: int, quick: bool = False) -> Iterator[Limit]:
    """Measure every instruction set of the machine; quick: the best one alone, at three sizes."""
    isas = _library.status().available
    if not isas:
        return
    from fast_transformer import _machine

    rates = {move: getattr(_machine, f"{move}_bandwidth") for move in MOVES}
    steps = sizes()
    if quick:
        isas, steps = isas[-1:], steps[1:6:2]
    for isa in isas:
        for name, dtype in DTYPES.items():
            yield Limit(isa, name, None, together(threads, _machine.peak_flops, isa, dtype))
        for size in steps:
            for move, rate in rates.items():
                yield Limit(isa, move, size, together(threads, rate, isa, size))


def together(threads: int, rate: Callable[..., float], *arguments: object) -> float:
    """The sum of what all threads reach at the same time."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: rate(*arguments), range(threads)))


def sizes() -> list[int]:
    """Bytes of one thread's buffers, by fours from 4 KB to the first that no cache holds.

    As far as a quarter of the free memory goes.
    """
    found, largest = [SMALLEST], available_memory() // 4
    while found[-1] <= last_cache() and 4 * found[-1] <= largest:
        found.append(4 * found[-1])
    return found


def last_cache() -> int:
    """Bytes of the largest cache that Linux knows of."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 10, "M": 20, "G": 30}
    texts = [path.read_text().strip() for path in caches]
    return max((int(t[:-1]) << units[t[-1]] for t in texts), default=CACHE_UNKNOWN)


def show(limits: list[Limit]) -> None:
    """A table for each instruction set."""
    for isa in dict.fromkeys(x.isa for x in limits):
        own = {(x.what, x.bytes): x.rate / 1e9 for x in limits if x.isa == isa}
        peaks = ", ".join(f"{own[name, None]:.0f} GFLOP/s in {name}" for name in DTYPES)
        print(f"{isa}: {peaks}")
        print(f"{'GB/s within':>14} " + " ".join(f"{move:>10}" for move in MOVES))
        for size in sorted({size for _, size in own if size is not None}):
            rates = " ".join(f"{own[move, size]:10.1f}" for move in MOVES)
            print(f"{_named(size):>14} {rates}")


def _named(size: int) -> str:
    for shift, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if size >> shift:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"
