"""The cases of attention_decode in the table of testing.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fast_transformer.attention_cases import generator, spread_lengths


@dataclass(frozen=True)
class DecodeCase:
    """One call of attention_decode.

    shape: batch, heads, kv_heads, T, S, head_dim; the longest sequence has S keys, of which the
    last `new` are not in the cache yet. fill: the mean length as a part of S. value_dim: head_dim
    unless given. block_size: of a paged cache, whose blocks are shuffled. Where the cache holds no
    key it is NaN.
    """

    name: str
    use: str
    shape: tuple[int, int, int, int, int, int]
    new: int = 0
    fill: float = 1.0
    value_dim: int | None = None
    block_size: int | None = None
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    alibi: bool = False
    softcap: float = 0.0
    family: str = "decode"
    op: str = "attention_decode"
    wrt: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What tells most about its cost."""
        _, heads, kv_heads, T, _, _ = self.shape
        if self.block_size is not None:
            return "decode-paged"
        if T > 1:
            return "decode-tokens"
        return "decode" if heads == kv_heads else "decode-gqa"

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        B, H, KV, T, S, D = self.shape
        random = generator(self.name)
        dims = {"key": D, "value": D if self.value_dim is None else self.value_dim}
        lengths = torch.tensor(spread_lengths(B, S, self.fill)) - self.new
        made: dict[str, Any] = {"cache_lengths": lengths, "return_lse": True}
        made["query"] = torch.randn(B, H, T, D, generator=random).to(dtype)
        size = self.block_size or S
        per_sequence = -(-S // size)
        table = torch.randperm(B * per_sequence, generator=random).view(B, per_sequence)
        made["block_table"] = table if self.block_size is not None else None
        empty = torch.arange(per_sequence * size) >= lengths[:, None]
        for name, dim in dims.items():
            cache = torch.randn(B, KV, per_sequence * size, dim, generator=random).to(dtype)
            cache.masked_fill_(empty[:, None, :, None], torch.nan)
            if self.block_size is not None:
                blocks = cache.view(B, KV, per_sequence, size, dim).transpose(1, 2).flatten(0, 1)
                cache = blocks[table.flatten().argsort()]
            made[f"{name}_cache"] = cache
            if self.new:
                made[f"new_{name}"] = torch.randn(B, KV, self.new, dim, generator=random).to(dtype)
        if self.alibi:
            made["alibi_slopes"] = 2.0 ** (-8 * (torch.arange(H) + 1) / H)
        return made | {"causal": self.causal, "window": self.window, "softcap": self.softcap}


def _decode_tests() -> Iterable[DecodeCase]:
    shapes = [  # odd ones first; lengths around the ends of splits, groups of every size
        (1, 1, 1, 1, 1, 1), (2, 3, 3, 1, 63, 8), (1, 2, 1, 3, 65, 40), (2, 6, 2, 2, 127, 80),
        (1, 5, 1, 1, 513, 96), (2, 4, 4, 8, 511, 64), (1, 8, 2, 4, 1100, 128), (1, 3, 3, 9, 4, 24),
        (1, 16, 2, 1, 1537, 33), (3, 32, 4, 5, 70, 256),
    ]  # fmt: skip
    for shape in shapes:
        size = "x".join(map(str, shape))
        yield DecodeCase(f"decode-{size}", "test", shape)
        yield DecodeCase(f"decode-new-{size}", "test", shape, new=1, fill=0.8, block_size=16)
    variants: dict[str, dict[str, Any]] = {
        "full": {"causal": False}, "window": {"window": (40, -1)}, "alibi": {"alibi": True},
        "window-both": {"window": (600, 2), "causal": False}, "softcap": {"softcap": 15.0},
        "value-dim": {"value_dim": 72}, "everything": {"window": (1000, 1), "alibi": True,
        "softcap": 30.0, "value_dim": 17, "block_size": 7, "causal": False},
    }  # fmt: skip
    for name, options in variants.items():
        yield DecodeCase(f"{name}-short", "test", (2, 6, 2, 3, 90, 40), 3, 0.6, **options)
        yield DecodeCase(f"{name}-long", "test", (3, 4, 2, 1, 1300, 64), 1, 0.6, **options)


def _decode_benches() -> Iterable[DecodeCase]:
    for B, H, KV, D in ((1, 12, 12, 64), (8, 12, 12, 64), (64, 12, 12, 64), (1, 32, 8, 128),
                        (8, 32, 8, 128), (1, 12, 1, 64), (8, 12, 1, 64)):  # fmt: skip
        for S in (128, 1024, 4096, 16384):
            if B * KV * S * D <= 2**25:  # 128 MB of keys in float32, and as many of values
                name = f"decode-B{B}-H{H}-{KV}-S{S}-D{D}"
                yield DecodeCase(name, "bench", (B, H, KV, 1, S, D))
    groups = {"H12": (1, 12, 12, 1, 4096, 64), "H32-8": (1, 32, 8, 1, 4096, 128)}
    for name, (B, H, KV, T, S, D) in groups.items():
        for T in (4, 8):
            yield DecodeCase(f"decode-T{T}-{name}", "bench", (B, H, KV, T, S, D))
        for size in (16, 256):
            yield DecodeCase(f"paged-{size}-{name}", "bench", (B, H, KV, 1, S, D), block_size=size)


DECODE_CASES: tuple[DecodeCase, ...] = (*_decode_tests(), *_decode_benches())
