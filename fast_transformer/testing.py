"""The fixed table of cases that tests and benchmarks walk; the error allowed is in accuracy.py.

A case says what is computed, not on what: `case.inputs(dtype)` makes fresh arguments for the public
function `case.op`, the same at every call. Cases for "test" are small and odd, those for "bench"
have the sizes that models use; both lists are fixed, so that no kernel is tuned to be measured.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast_transformer.accuracy import assert_close_to_reference, check, evaluate, in_float64

__all__ = [
    "CASES",
    "DTYPES",
    "AttentionCase",
    "DecodeCase",
    "MlpCase",
    "NormCase",
    "assert_close_to_reference",
    "cases",
    "check",
    "evaluate",
    "in_float64",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionCase:
    """One call of attention, or of attention_varlen where padding is "varlen".

    shape: batch, heads, T, S, head_dim. padding: "right" passes key_lengths, "left" key_starts,
    "varlen" packs the sequences; `fill` is the part of the positions that holds tokens.
    bias: "bool" (T, S), "padding" a bool (batch, 1, 1, S), or "additive" (heads, T, S).
    """

    name: str
    use: str
    shape: tuple[int, int, int, int, int]
    causal: bool = False
    causal_offset: int | None = None
    padding: str | None = None
    fill: float = 1.0
    bias: str | None = None
    dropout_p: float = 0.0
    family: str = "attention"

    @property
    def op(self) -> str:
        """The public function."""
        return "attention_varlen" if self.padding == "varlen" else "attention"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        return ("query", "key", "value")

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        B, H, T, S, D = self.shape
        random = _random(self.name)
        options: dict[str, Any] = {"causal": self.causal, "return_lse": True}
        if self.causal_offset is not None:
            options["causal_offset"] = self.causal_offset
        if self.dropout_p > 0:
            options["dropout_p"], options["seed"] = self.dropout_p, torch.tensor(20170612)
        if self.bias == "additive":
            options["bias"] = torch.randn(H, T, S, generator=random).to(dtype)
        elif self.bias == "bool":
            options["bias"] = torch.rand(T, S, generator=random) < 0.7
        elif self.bias == "padding":
            options["bias"] = torch.rand(B, 1, 1, S, generator=random) < 0.7
        shapes: list[tuple[int, ...]] = [(B, H, T, D), (B, H, S, D), (B, H, S, D)]
        if self.padding == "right":
            options["key_lengths"] = torch.tensor(_lengths(B, S, self.fill))
        elif self.padding == "left":
            options["key_starts"] = S - torch.tensor(_lengths(B, S, self.fill))
        elif self.padding == "varlen":
            q, k = _lengths(B, T, self.fill), _lengths(B, S, self.fill)
            options |= {"max_seqlen_q": T, "max_seqlen_k": S}
            options |= {"cu_seqlens_q": _offsets(q), "cu_seqlens_k": _offsets(k)}
            shapes = [(sum(q), H, D), (sum(k), H, D), (sum(k), H, D)]
        tensors = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
        return dict(zip(self.wrt, tensors, strict=True)) | options


@dataclass(frozen=True)
class NormCase:
    """One call of layer_norm, or of add_norm where `added`."""

    name: str
    use: str
    shape: tuple[int, ...]
    added: bool = False
    affine: bool = True
    float32_parameters: bool = False
    dropout_p: float = 0.0
    return_sum: bool = False
    family: str = "norm"

    @property
    def op(self) -> str:
        """The public function."""
        return "add_norm" if self.added else "layer_norm"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        parameters = ("weight", "bias") if self.affine else ()
        return ("x", "residual", *parameters) if self.added else ("x", *parameters)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        random = _random(self.name)
        made: dict[str, Any] = {"x": torch.randn(self.shape, generator=random).to(dtype)}
        if self.added:
            made["residual"] = torch.randn(self.shape, generator=random).to(dtype)
            made["return_sum"] = self.return_sum
        if self.affine:
            own = torch.float32 if self.float32_parameters else dtype
            made["weight"] = (1 + torch.randn(self.shape[-1], generator=random)).to(own)
            made["bias"] = torch.randn(self.shape[-1], generator=random).to(own)
        if self.dropout_p > 0:
            made["dropout_p"], made["seed"] = self.dropout_p, torch.tensor(20160721)
        return made


@dataclass(frozen=True)
class MlpCase:
    """One call of linear_act (M, K, N), or of mlp (M, C, F, N)."""

    name: str
    use: str
    shape: tuple[int, ...]
    activation: str | None = "gelu"
    biased: bool = True
    dropout_p: float = 0.0
    family: str = "mlp"

    @property
    def op(self) -> str:
        """The public function."""
        return "linear_act" if len(self.shape) == 3 else "mlp"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        if self.op == "linear_act":
            return ("x", "weight", "bias") if self.biased else ("x", "weight")
        return ("x", "w1", "b1", "w2", "b2") if self.biased else ("x", "w1", "w2")

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name; weights are scaled so that every layer keeps its input's size."""
        random = _random(self.name)
        M, *sizes = self.shape
        made: dict[str, Any] = {"activation": self.activation}
        made["x"] = torch.randn(M, sizes[0], generator=random).to(dtype)
        names = (("weight", "bias"),) if self.op == "linear_act" else (("w1", "b1"), ("w2", "b2"))
        for (weight, bias), fan_in, fan_out in zip(names, sizes, sizes[1:], strict=False):
            scaled = torch.randn(fan_out, fan_in, generator=random) * fan_in**-0.5
            made[weight] = scaled.to(dtype)
            made[bias] = torch.randn(fan_out, generator=random).to(dtype) if self.biased else None
        if self.dropout_p > 0:
            made["dropout_p"], made["seed"] = self.dropout_p, torch.tensor(20181011)
        return made


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

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        B, H, KV, T, S, D = self.shape
        random = _random(self.name)
        dims = {"key": D, "value": D if self.value_dim is None else self.value_dim}
        lengths = torch.tensor(_lengths(B, S, self.fill)) - self.new
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


Case = AttentionCase | NormCase | MlpCase | DecodeCase


def _random(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _lengths(batch: int, longest: int, fill: float) -> list[int]:
    """Lengths spread evenly around fill · longest, the shortest about (2 · fill − 1) · longest."""
    low = 2 * fill - 1
    return [round(longest * (low + (1 - low) * (b + 0.5) / batch)) for b in range(batch)]


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _attention_tests() -> Iterable[AttentionCase]:
    shapes = [  # odd ones first; every head_dim and length is off the blocks of some kernel
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
    "dropout": {"dropout_p": 0.1},
    "causal-dropout": {"causal": True, "dropout_p": 0.1},
    "varlen-dropout": {"padding": "varlen", "fill": 0.6, "dropout_p": 0.1},
}


def _attention_benches() -> Iterable[AttentionCase]:
    for length in (1, 63, 77, 128, 197, 333, 512, 1024, 2048):
        for head_dim in (64,) if length not in (128, 333, 1024) else (32, 40, 64, 80, 96, 128):
            batch = max(1, 2048 // length // 4)
            shape = (batch, 4, length, length, head_dim)
            yield AttentionCase(f"full-T{length}-D{head_dim}", "bench", shape)
            yield AttentionCase(f"causal-T{length}-D{head_dim}", "bench", shape, causal=True)
    models = {"minilm": (32, 12, 128, 128, 32), "bert-base": (8, 12, 512, 512, 64)}
    for model, shape in models.items():
        for name, options in _MASKS.items():
            yield AttentionCase(f"{model}-{name}", "bench", shape, **options)


def _norm_tests() -> Iterable[NormCase]:
    for width in (1, 63, 384, 768, 1024, 4096):
        yield NormCase(f"norm-{width}", "test", (3, 3, width))
        yield NormCase(f"add-{width}", "test", (5, width), added=True, return_sum=True)
        yield NormCase(f"add-dropout-{width}", "test", (7, width), added=True, dropout_p=0.3)
    yield NormCase("norm-plain", "test", (65, 127), affine=False)
    yield NormCase("norm-vector", "test", (197,))
    yield NormCase("norm-float32", "test", (33, 130), float32_parameters=True)
    yield NormCase("add-plain", "test", (2, 3, 129), added=True, affine=False)
    yield NormCase(
        "add-dropout-sum", "test", (2, 33, 65), added=True, dropout_p=0.5, return_sum=True
    )


def _norm_benches() -> Iterable[NormCase]:
    for rows, width in ((1, 768), (333, 384), (4096, 384), (2048, 768), (2048, 1024), (512, 4096)):
        size = f"{rows}x{width}"
        yield NormCase(f"norm-{size}", "bench", (rows, width))
        yield NormCase(f"add-{size}", "bench", (rows, width), added=True)
        yield NormCase(f"add-sum-{size}", "bench", (rows, width), added=True, return_sum=True)
        yield NormCase(f"add-dropout-{size}", "bench", (rows, width), added=True, dropout_p=0.1)


def _mlp_tests() -> Iterable[MlpCase]:
    shapes: list[tuple[int, ...]] = [
        (1, 1, 1), (3, 5, 7), (63, 65, 33), (1, 384, 197), (130, 77, 127), (9, 600, 80),
        (1, 1, 1, 1), (2, 3, 7, 5), (65, 33, 63, 127), (1, 384, 1536, 384),
        # several units of rows; a weight that is packed in parts; rows in several chunks
        (401, 70, 300), (201, 512, 9000), (2700, 24, 1600, 20),
        (3, 16384, 20),  # few rows, long sums
    ]  # fmt: skip
    for shape in shapes:
        op = "linear" if len(shape) == 3 else "mlp"
        yield MlpCase(f"{op}-" + "x".join(map(str, shape)), "test", shape)
    for activation in (None, "gelu", "gelu_tanh", "relu", "silu"):
        yield MlpCase(f"linear-{activation}", "test", (37, 40, 50), activation)
        yield MlpCase(f"linear-{activation}-plain", "test", (5, 40, 50), activation, biased=False)
        yield MlpCase(f"mlp-{activation}", "test", (37, 40, 150, 30), activation)
        yield MlpCase(f"mlp-{activation}-dropout", "test", (9, 40, 77, 20), activation, True, 0.3)
    yield MlpCase("mlp-plain", "test", (9, 40, 77, 20), biased=False)


def _mlp_benches() -> Iterable[MlpCase]:
    for width, hidden in ((384, 1536), (768, 3072)):
        for M in (1, 4, 16, 77, 128, 512, 2048, 4096):
            yield MlpCase(f"linear-{M}x{width}x{width}", "bench", (M, width, width), None)
            yield MlpCase(f"linear-gelu-{M}x{width}", "bench", (M, width, hidden))
            yield MlpCase(f"mlp-{M}x{width}", "bench", (M, width, hidden, width))
    yield MlpCase("mlp-tanh-512x768", "bench", (512, 768, 3072, 768), "gelu_tanh")
    yield MlpCase("mlp-relu-512x768", "bench", (512, 768, 3072, 768), "relu")
    yield MlpCase("mlp-dropout-512x768", "bench", (512, 768, 3072, 768), "gelu", True, 0.1)


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


CASES: tuple[Case, ...] = (
    *_attention_tests(),
    *_attention_benches(),
    *_norm_tests(),
    *_norm_benches(),
    *_mlp_tests(),
    *_mlp_benches(),
    *_decode_tests(),
    *_decode_benches(),
)


def cases(family: str, use: str) -> list[Case]:
    """Return the cases of one family for "test" or "bench"."""
    return [case for case in CASES if case.family == family and case.use == use]
