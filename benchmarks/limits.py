"""What the processor could do at best, measured by the library's own loops."""

import functools

import torch

from fast_transformer.env import env


@functools.cache
def peak_flops(dtype: str) -> float | None:
    """FLOP/s of one core's registers for "fp32", "bf16" or "fp16"; None without the kernels."""
    if (isa := env()["isa"]) is None:
        return None
    from fast_transformer import _machine

    return _machine.peak_flops(isa, dtype)


@functools.cache
def copy_rate(size: int) -> float | None:
    """Bytes a second that one core reads and writes, in a buffer of `size` bytes."""
    if (isa := env()["isa"]) is None:
        return None
    from fast_transformer import _machine

    return _machine.copy_bandwidth(isa, size)


def part_of_limit(dtype: str, flops: float | None, moved: float | None, seconds: float):
    """(rate as text, part of what all threads could do, or None)."""
    threads = torch.get_num_threads()
    if flops is not None:
        rate, peak = flops / seconds, peak_flops(dtype)
        return f"{rate / 1e9:.0f} GFLOP/s", peak and rate / peak / threads
    if moved is not None:
        # rounded, so that shapes of about one size share a measurement
        size = 1 << max(12, round(moved / threads).bit_length())
        rate, peak = moved / seconds, copy_rate(size)
        return f"{rate / 1e9:.1f} GB/s", peak and rate / peak / threads
    return "", None
