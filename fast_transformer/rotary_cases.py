"""The cases of rotary in the table of testing.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fast_transformer.attention_cases import generator


@dataclass(frozen=True)
class RotaryCase:
    """One call of rotary.

    shape: batch, heads, kv_heads, T, head_dim; without kv_heads there is no key. rotated: columns
    that turn, by default all. transposed: laid out in memory as (batch, T, heads, head_dim).
    per_sequence: positions of each sequence's own. wide_tables: cos and sin in float32.
    """

    name: str
    use: str
    shape: tuple[int, int, int, int, int]
    rotated: int | None = None
    interleaved: bool = False
    transposed: bool = False
    per_sequence: bool = False
    wide_tables: bool = True
    family: str = "rotary"
    op: str = "rotary"

    @property
    def kind(self) -> str:
        """The layout of the pairs, and whether all columns turn."""
        layout = "interleaved" if self.interleaved else "halves"
        return layout if self.rotated is None else f"{layout}, partial"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        return ("query", "key") if self.shape[2] else ("query",)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name; the angles are those of base 10000."""
        B, H, KV, T, D = self.shape
        random = generator(self.name)
        made: dict[str, Any] = {"key": None, "interleaved": self.interleaved}
        for name, heads in (("query", H), ("key", KV)):
            if heads:
                order = (B, T, heads, D) if self.transposed else (B, heads, T, D)
                x = torch.randn(order, generator=random).to(dtype)
                made[name] = x.transpose(1, 2) if self.transposed else x
        R = D if self.rotated is None else self.rotated
        positions = torch.arange(T, dtype=torch.float64)
        if self.per_sequence:
            positions = positions + torch.randint(0, 100, (B, 1), generator=random)
        angles = positions[..., None] * 10000.0 ** (-torch.arange(0, R, 2) / max(R, 1))
        tables = torch.float32 if self.wide_tables else dtype
        return made | {"cos": angles.cos().to(tables), "sin": angles.sin().to(tables)}


def _rotary_tests() -> Iterable[RotaryCase]:
    shapes: list[tuple[tuple[int, int, int, int, int], int | None]] = [
        ((1, 1, 0, 1, 1), 0), ((2, 3, 1, 5, 2), None), ((1, 2, 2, 63, 40), None),
        ((2, 4, 2, 65, 64), None), ((1, 3, 1, 127, 80), 20), ((2, 2, 1, 33, 96), 94),
        ((1, 5, 0, 197, 128), None), ((3, 1, 1, 7, 256), 64), ((1, 2, 1, 3, 17), 14),
    ]  # fmt: skip
    for i, (shape, rotated) in enumerate(shapes):
        size = "x".join(map(str, shape))
        for interleaved in (False, True):
            name = f"{'interleaved' if interleaved else 'halves'}-{size}"
            own, wide = i % 2 == 1, i % 3 != 2
            yield RotaryCase(name, "test", shape, rotated, interleaved, False, own, wide)
            yield RotaryCase(f"{name}-t", "test", shape, rotated, interleaved, True, not own, wide)


def _rotary_benches() -> Iterable[RotaryCase]:
    shapes = [
        (1, 12, 12, 77, 64), (8, 12, 12, 128, 64), (1, 12, 12, 2048, 64), (1, 32, 8, 2048, 128),
        (8, 32, 8, 1, 128), (1, 16, 16, 333, 80),
    ]  # fmt: skip
    for B, H, KV, T, D in shapes:
        size = f"B{B}-H{H}-{KV}-T{T}-D{D}"
        for interleaved in (False, True):
            name = f"{'interleaved' if interleaved else 'halves'}-{size}"
            partial = 32 if D == 80 else None
            yield RotaryCase(name, "bench", (B, H, KV, T, D), partial, interleaved)
            if not interleaved:
                yield RotaryCase(f"{name}-t", "bench", (B, H, KV, T, D), partial, transposed=True)


ROTARY_CASES: tuple[RotaryCase, ...] = (*_rotary_tests(), *_rotary_benches())
