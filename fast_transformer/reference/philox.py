"""Dropout masks from Philox4x32-10, the counter-based generator of Salmon et al. 2011.

An element's fate is a function of (seed, batch, head, row, column) alone, so that every backend,
every tile order and the backward pass draw the same mask without storing it.
"""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as 32-bit fractions
_WORD = 0xFFFFFFFF
_DRAWS = 8  # 16-bit draws in the four 32-bit words of one call


def philox4x32(counter, key):
    """Return the four output words of Philox4x32-10, each below 2³².

    counter: four, key: two int64 tensors or ints below 2³², broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(constant, word):
    """High and low half of a 32 × 32-bit product; in 16-bit steps, as int64 holds no 64 bits."""
    by_low = constant * (word & 0xFFFF)  # below 2⁴⁸, as is the next
    by_high = constant * (word >> 16) + (by_low >> 16)
    return by_high >> 16, ((by_high & 0xFFFF) << 16) | (by_low & 0xFFFF)


def threshold(dropout_p: float) -> int:
    """Of 65536 equally likely draws, how many drop an element."""
    return round(65536 * dropout_p)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by: 1 / (the quantised rate of keeping)."""
    kept = 65536 - threshold(dropout_p)
    return 65536 / kept if kept else 0.0


def keep_mask(
    seed: Tensor, dropout_p: float, batch: int, heads: int, rows: int, columns: int
) -> Tensor:
    """Return the bool mask (batch, heads, rows, columns) of the elements that are kept.

    seed: 0-d int64 tensor. The draw of column c is the 16-bit piece c % 8 of the call whose
    counter is (c // 8, row, head, batch); an element stays when its draw reaches the threshold.
    """
    device = seed.device

    def count(size, *shape):
        return torch.arange(size, device=device, dtype=torch.int64).view(*shape)

    counter = (
        count((columns + _DRAWS - 1) // _DRAWS, 1, 1, 1, -1),
        count(rows, 1, 1, -1, 1),
        count(heads, 1, -1, 1, 1),
        count(batch, -1, 1, 1, 1),
    )
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    draws = torch.stack([w >> s & 0xFFFF for w in words for s in (0, 16)], dim=-1)
    return draws.flatten(-2)[..., :columns] >= threshold(dropout_p)


def dropout(x, dropout_p, seed):
    """Drop elements of x (..., columns): its rows are numbered in order, head and batch are 0."""
    if dropout_p == 0.0:
        return x
    columns = x.shape[-1]
    keep = keep_mask(seed, dropout_p, 1, 1, math.prod(x.shape[:-1]), columns).view(x.shape)
    return x.masked_fill(~keep, 0.0) * keep_scale(dropout_p)
