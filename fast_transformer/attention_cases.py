"""The cases of attention and relative_attention in the table of testing.py."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int, int, int]


def generator(name: str) -> torch.Generator:
    """Return the source of a case's random numbers: the same at every call."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def offsets(lengths: list[int]) -> Tensor:
    """cu_seqlens of sequences that have these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


def spread_lengths(batch: int, longest: int, fill: float) -> list[int]:
    """Lengths spread evenly around fill · longest, the shortest about (2 · fill − 1) · longest."""
    low = 2 * fill - 1
    return [round(longest * (low + (1 - low) * (b + 0.5) / batch)) for b in range(batch)]


@dataclass(frozen=True)
class _ScoresCase:
    """What attention and relative_attention have in common.

    shape: batch, heads, T, S, head_dim. padding: "right" passes key_lengths, "left" key_starts;
    `fill` is the part of the positions that holds tokens. bias: "bool" (T, S), "padding" a bool
    (batch, 1, 1, S), or "additive" (heads, T, S); bias_gradient: it is differentiated. alibi: the
    slopes of Press et al. 2022, one a head. kv_heads and value_dim: by default heads and head_dim.
    """

    name: str
    use: str
    shape: Shape
    causal: bool = False
    causal_offset: int | None = None
    padding: str | None = None
    fill: float = 1.0
    bias: str | None = None
    dropout_p: float = 0.0
    kv_heads: int | None = None
    value_dim: int | None = None
    window: tuple[int, int] = (-1, -1)
    alibi: bool = False
    softcap: float = 0.0
    bias_gradient: bool = False

    @property
    def kind(self) -> str:
        """What tells most about its cost, dearest first."""
        masks = {
            "bias-gradient": self.bias_gradient,
            "dropout": self.dropout_p > 0,
            "varlen": self.padding == "varlen",
            "padded": self.padding is not None,
            "bias": self.bias is not None,
            "softcap": self.softcap > 0,
            "alibi": self.alibi,
            "window": self.window != (-1, -1),
            "value-dim": self.value_dim is not None,
            "gqa": self.kv_heads is not None,
            "causal": self.causal,
        }
        return next((name for name, has in masks.items() if has), "full")

    def options(self, random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        """What is passed beside the tensors that are packed."""
        B, H, T, S, _ = self.shape
        options: dict[str, Any] = {"causal": self.causal, "return_lse": True}
        if self.causal_offset is not None:
            options["causal_offset"] = self.causal_offset
        if self.window != (-1, -1):
            options["window"] = self.window
        if self.softcap > 0:
            options["softcap"] = self.softcap
        if self.alibi:
            options["alibi_slopes"] = 2 ** (-8 * torch.arange(1, H + 1) / H)
        if self.dropout_p > 0:
            options["dropout_p"], options["seed"] = self.dropout_p, torch.tensor(20170612)
        if self.bias == "additive":
            options["bias"] = torch.randn(H, T, S, generator=random).to(dtype)
        elif self.bias == "bool":
            options["bias"] = torch.rand(T, S, generator=random) < 0.7
        elif self.bias == "padding":
            options["bias"] = torch.rand(B, 1, 1, S, generator=random) < 0.7
        if self.padding == "right":
            options["key_lengths"] = torch.tensor(spread_lengths(B, S, self.fill))
        elif self.padding == "left":
            options["key_starts"] = S - torch.tensor(spread_lengths(B, S, self.fill))
        return options

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Heads and head_dim of query, key and value."""
        _, H, _, _, D = self.shape
        kv_heads = self.kv_heads or H
        return (H, D), (kv_heads, D), (kv_heads, self.value_dim or D)


@dataclass(frozen=True)
class AttentionCase(_ScoresCase):
    """One call of attention, or of attention_varlen where padding is "varlen"."""

    family: str = "attention"

    @property
    def op(self) -> str:
        """The public function."""
        return "attention_varlen" if self.padding == "varlen" else "attention"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        return ("query", "key", "value", *["bias"] * self.bias_gradient)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        B, _, T, S, _ = self.shape
        random = generator(self.name)
        options = self.options(random, dtype)
        sizes = (T, S, S)
        shapes: list[tuple[int, ...]] = [
            (B, heads, size, dim) for size, (heads, dim) in zip(sizes, self.widths, strict=True)
        ]
        if self.padding == "varlen":
            q, k = spread_lengths(B, T, self.fill), spread_lengths(B, S, self.fill)
            options |= {"max_seqlen_q": T, "max_seqlen_k": S}
            options |= {"cu_seqlens_q": offsets(q), "cu_seqlens_k": offsets(k)}
            tokens = (sum(q), sum(k), sum(k))
            shapes = [(n, *width) for n, width in zip(tokens, self.widths, strict=True)]
        tensors = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
        return dict(zip(("query", "key", "value"), tensors, strict=True)) | options


@dataclass(frozen=True)
class RelativeCase(_ScoresCase):
    """One call of relative_attention.

    layout: "xlnet" has rows for every distance, "transformer-xl" for those behind the query (with
    causal). positions, segments, biases (of content and of those of the two that are there): the
    terms of the score. distance: a distance_bias for each head.
    """

    layout: str = "xlnet"
    positions: bool = True
    segments: bool = False
    biases: bool = True
    distance: bool = False
    family: str = "relative"

    op = "relative_attention"

    @property
    def kind(self) -> str:
        """Which terms there are."""
        return self.layout if self.positions else "distance" if self.distance else "segments"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        wanted = {
            "position_key": self.positions,
            "content_bias": self.biases,
            "position_bias": self.biases and self.positions,
            "segment_key": self.segments,
            "segment_bias": self.biases and self.segments,
            "distance_bias": self.distance,
            "bias": self.bias_gradient,
        }
        return ("query", "key", "value", *(name for name, wants in wanted.items() if wants))

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        B, H, T, S, D = self.shape
        random = generator(self.name)
        made = self.options(random, dtype)
        L = T + S if self.layout == "xlnet" else S
        if self.layout == "transformer-xl":
            made["position_zero"] = T - 1
        shapes: dict[str, tuple[int, ...]] = {
            name: (B, heads, size, dim)
            for name, size, (heads, dim) in zip(
                ("query", "key", "value"), (T, S, S), self.widths, strict=True
            )
        }
        shapes |= {"position_key": (L, H, D), "segment_key": (2, H, D), "distance_bias": (H, L)}
        for name in self.wrt:
            if name != "bias":
                shape = shapes.get(name, (H, D))
                own = torch.float32 if name == "distance_bias" else dtype
                made[name] = torch.randn(shape, generator=random).to(own)
        if self.segments:
            made["query_segments"] = (torch.arange(T) * 3 // T).expand(B, T)
            made["key_segments"] = (torch.arange(S) * 3 // S).expand(B, S)
        return made


_MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_offset": 0},
    "padded": {"padding": "right", "fill": 0.6},
    "left-padded": {"padding": "left", "fill": 0.6},
    "varlen": {"padding": "varlen", "fill": 0.6},
    "varlen-causal": {"padding": "varlen", "fill": 0.6, "causal": True},
    "bool": {"bias": "bool"},
    "bool-padding": {"bias": "padding"},
    "additive": {"bias": "additive"},
    "additive-gradient": {"bias": "additive", "bias_gradient": True},
    "dropout": {"dropout_p": 0.1},
    "causal-dropout": {"causal": True, "dropout_p": 0.1},
    "varlen-dropout": {"padding": "varlen", "fill": 0.6, "dropout_p": 0.1},
}


def _attention_tests() -> Iterable[AttentionCase]:
    shapes: list[Shape] = [  # odd ones first; every head_dim and length is off a kernel's blocks
        (1, 1, 1, 1, 1), (2, 3, 1, 63, 8), (1, 2, 63, 65, 40), (2, 1, 65, 63, 64),
        (1, 2, 77, 127, 80), (1, 1, 127, 197, 96), (1, 1, 197, 77, 128), (2, 2, 33, 333, 32),
        (1, 1, 20, 513, 3), (1, 1, 66, 130, 256),
    ]  # fmt: skip
    for shape in shapes:
        size = "x".join(map(str, shape))
        yield AttentionCase(f"full-{size}", "test", shape)
        yield AttentionCase(f"causal-{size}", "test", shape, causal=True)
    for name, options in _MASKS.items():
        yield AttentionCase(f"{name}-small", "test", (3, 2, 70, 70, 24), **options)
        yield AttentionCase(f"{name}-uneven", "test", (3, 2, 37, 150, 64), **options)
    yield AttentionCase(
        "everything", "test", (3, 2, 65, 150, 40), causal=True, causal_offset=60, padding="right",
        fill=0.6, bias="additive", dropout_p=0.2,
    )  # fmt: skip
    yield AttentionCase(
        "everything-varlen", "test", (4, 2, 65, 150, 40), causal=True, padding="varlen", fill=0.6,
        bias="additive", dropout_p=0.2,
    )  # fmt: skip
    yield from _attention_option_tests()


def _attention_option_tests() -> Iterable[AttentionCase]:
    alone: dict[str, dict[str, Any]] = {
        "gqa": {"kv_heads": 2},
        "mqa": {"kv_heads": 1, "causal": True},
        "value-narrow": {"value_dim": 7},
        "value-wide": {"value_dim": 72, "causal": True},
        "window": {"window": (5, 3)},
        "window-left": {"window": (33, -1)},
        "window-right": {"window": (-1, 9), "causal_offset": 11},
        "window-diagonal": {"window": (0, 0)},
        "window-causal": {"window": (64, 20), "causal": True},
        "alibi": {"alibi": True},
        "alibi-causal": {"alibi": True, "causal": True, "causal_offset": 3},
        "softcap": {"softcap": 0.7},
        "softcap-causal": {"softcap": 30.0, "causal": True},
    }
    for name, options in alone.items():
        yield AttentionCase(f"{name}-small", "test", (1, 4, 9, 13, 5), **options)
        yield AttentionCase(f"{name}-uneven", "test", (2, 4, 77, 197, 40), **options)
        yield AttentionCase(f"{name}-falling", "test", (1, 4, 150, 70, 24), **options)
        if "causal_offset" not in options:
            yield AttentionCase(
                f"{name}-varlen", "test", (3, 4, 65, 90, 24), padding="varlen", fill=0.6, **options
            )
    everything: dict[str, Any] = {
        "kv_heads": 2, "value_dim": 24, "window": (60, 40), "alibi": True, "softcap": 2.0,
        "bias": "additive", "bias_gradient": True, "dropout_p": 0.2, "fill": 0.6,
    }  # fmt: skip
    for padding in ("right", "left", "varlen"):
        yield AttentionCase(
            f"options-{padding}", "test", (3, 4, 65, 150, 40), padding=padding, **everything
        )
        yield AttentionCase(
            f"options-causal-{padding}", "test", (3, 4, 77, 70, 33), padding=padding, causal=True,
            **everything,
        )  # fmt: skip


def _attention_benches() -> Iterable[AttentionCase]:
    for length in (1, 63, 77, 128, 197, 333, 512, 1024, 2048):
        for head_dim in (64,) if length not in (128, 333, 1024) else (32, 40, 64, 80, 96, 128):
            batch = max(1, 2048 // length // 4)
            shape = (batch, 4, length, length, head_dim)
            yield AttentionCase(f"full-T{length}-D{head_dim}", "bench", shape)
            yield AttentionCase(f"causal-T{length}-D{head_dim}", "bench", shape, causal=True)
    for length, heads in ((4096, 4), (8192, 2), (16384, 1)):
        shape = (1, heads, length, length, 64)
        yield AttentionCase(f"full-T{length}-D64", "long", shape)
        use = "bench" if length == 4096 else "long"
        yield AttentionCase(f"causal-T{length}-D64", use, shape, causal=True)
    models: dict[str, Shape] = {
        "minilm": (32, 12, 128, 128, 32),
        "bert-base": (8, 12, 512, 512, 64),
    }
    for model, shape in models.items():
        for name, options in _MASKS.items():
            yield AttentionCase(f"{model}-{name}", "bench", shape, **options)
    of_options: dict[str, dict[str, Any]] = {
        "window": {"window": (256, -1)},
        "alibi": {"alibi": True},
        "softcap": {"softcap": 30.0},
        "gqa": {"kv_heads": 4},
        "mqa": {"kv_heads": 1},
        "value128": {"value_dim": 128},
        "additive-gradient": {"bias": "additive", "bias_gradient": True},
    }
    for model, shape in models.items():
        for name, options in of_options.items():
            if name == "window":
                options = {"window": (shape[2] // 4, shape[2] // 4)}
            if name not in _MASKS:
                yield AttentionCase(f"{model}-{name}", "bench", shape, **options)
    for name, options in of_options.items():
        yield AttentionCase(f"T1024-{name}", "bench", (1, 12, 1024, 1024, 64), True, **options)


def _relative_tests() -> Iterable[RelativeCase]:
    terms: dict[str, dict[str, Any]] = {
        "positions": {},
        "bare": {"biases": False},
        "transformer-xl": {"layout": "transformer-xl", "causal": True},
        "segments": {"segments": True},
        "segments-alone": {"segments": True, "positions": False},
        "distance": {"positions": False, "biases": False, "distance": True},
        "distance-gqa": {"positions": False, "biases": False, "distance": True, "kv_heads": 1},
        "all": {"segments": True, "distance": True},
        "causal": {"causal": True, "segments": True},
        "window": {"window": (20, 7), "segments": True},
        "padded": {"padding": "right", "fill": 0.6, "segments": True},
        "left-padded": {"padding": "left", "fill": 0.6, "distance": True},
        "dropout": {"dropout_p": 0.2, "segments": True},
        "everything": {
            "segments": True, "distance": True, "value_dim": 17, "causal": True, "softcap": 3.0,
            "window": (50, -1), "alibi": True, "padding": "right", "fill": 0.6, "dropout_p": 0.2,
            "bias": "additive", "bias_gradient": True,
        },
    }  # fmt: skip
    for name, options in terms.items():
        yield RelativeCase(f"{name}-tiny", "test", (1, 2, 1, 1, 1), **options)
        yield RelativeCase(f"{name}-small", "test", (2, 2, 9, 13, 8), **options)
        yield RelativeCase(f"{name}-square", "test", (2, 2, 70, 70, 24), **options)
        yield RelativeCase(f"{name}-uneven", "test", (3, 2, 65, 150, 40), **options)


def _relative_benches() -> Iterable[RelativeCase]:
    for T, S in ((128, 128), (512, 512), (512, 1024)):
        shape = (4096 // S // 2, 12, T, S, 64)
        yield RelativeCase(f"xlnet-{T}x{S}", "bench", shape, segments=True)
        yield RelativeCase(
            f"transformer-xl-{T}x{S}", "bench", shape, causal=True, layout="transformer-xl"
        )
        yield RelativeCase(
            f"t5-{T}x{S}", "bench", shape, positions=False, biases=False, distance=True
        )


ATTENTION_CASES: tuple[AttentionCase | RelativeCase, ...] = (
    *_attention_tests(),
    *_attention_benches(),
    *_relative_tests(),
    *_relative_benches(),
)
