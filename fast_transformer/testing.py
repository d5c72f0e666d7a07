"""The fixed table of cases that tests and benchmarks walk; the error allowed is in accuracy.py.

A case says what is computed, not on what: `case.inputs(dtype)` makes fresh arguments for the public
function `case.op`, the same at every call. Cases for "test" are small and odd, those for "bench"
have the sizes that models use, those for "long" take minutes; all are fixed, so that no kernel is
tuned to be measured. A case's `kind` is the class that it is summed up in. Those of attention are
in attention_cases.py, decode_cases.py and so on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fast_transformer.accuracy import assert_close_to_reference, check, evaluate, in_float64
from fast_transformer.attention_cases import (
    ATTENTION_CASES,
    AttentionCase,
    RelativeCase,
    generator,
    offsets,
)
from fast_transformer.decode_cases import DECODE_CASES, DecodeCase
from fast_transformer.embedding_cases import EMBEDDING_CASES, EmbeddingCase
from fast_transformer.loss_cases import LOSS_CASES, LossCase
from fast_transformer.projection_cases import PROJECTION_CASES, GatedMlpCase, QkvCase
from fast_transformer.rotary_cases import ROTARY_CASES, RotaryCase

__all__ = [
    "CASES",
    "DTYPES",
    "AttentionCase",
    "DecodeCase",
    "LossCase",
    "EmbeddingCase",
    "GatedMlpCase",
    "MlpCase",
    "NormCase",
    "QkvCase",
    "RelativeCase",
    "RotaryCase",
    "assert_close_to_reference",
    "cases",
    "check",
    "evaluate",
    "in_float64",
    "offsets",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NormCase:
    """One call of `norm`, or of add_norm with it where `added`."""

    name: str
    use: str
    shape: tuple[int, ...]
    norm: str = "layer_norm"
    added: bool = False
    affine: bool = True
    float32_parameters: bool = False
    dropout_p: float = 0.0
    return_sum: bool = False
    family: str = "norm"

    @property
    def op(self) -> str:
        """The public function."""
        return "add_norm" if self.added else self.norm

    @property
    def kind(self) -> str:
        """What passes over the memory there are."""
        name = f"add {self.norm}" if self.added else self.norm
        return f"{name}, dropout" if self.dropout_p > 0 else name

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        parameters = ("weight", "bias") if self.norm == "layer_norm" else ("weight",)
        inputs = ("x", "residual") if self.added else ("x",)
        return (*inputs, *parameters) if self.affine else inputs

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        random = generator(self.name)
        made: dict[str, Any] = {"x": torch.randn(self.shape, generator=random).to(dtype)}
        if self.added:
            made["residual"] = torch.randn(self.shape, generator=random).to(dtype)
            made["return_sum"], made["norm"] = self.return_sum, self.norm
        if self.affine:
            own = torch.float32 if self.float32_parameters else dtype
            made["weight"] = (1 + torch.randn(self.shape[-1], generator=random)).to(own)
            if self.norm == "layer_norm":
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
    def kind(self) -> str:
        """The public function."""
        return self.op

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        if self.op == "linear_act":
            return ("x", "weight", "bias") if self.biased else ("x", "weight")
        return ("x", "w1", "b1", "w2", "b2") if self.biased else ("x", "w1", "w2")

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name; weights are scaled so that every layer keeps its input's size."""
        random = generator(self.name)
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


Case = (
    AttentionCase
    | RelativeCase
    | DecodeCase
    | NormCase
    | MlpCase
    | LossCase
    | RotaryCase
    | EmbeddingCase
    | GatedMlpCase
    | QkvCase
)


# How the names of a norm's cases begin: alone, added, added behind dropout.
_NORMS = {
    "layer_norm": ("norm", "add", "add-dropout"),
    "rms_norm": ("rms", "add-rms", "add-dropout-rms"),
}


def _norm_tests() -> Iterable[NormCase]:
    for norm, (alone, add, drop) in _NORMS.items():
        for width in (1, 63, 384, 768, 1024, 4096, 8192, 16384):
            yield NormCase(f"{alone}-{width}", "test", (3, 3, width), norm)
            yield NormCase(f"{add}-{width}", "test", (5, width), norm, True, return_sum=True)
            yield NormCase(f"{drop}-{width}", "test", (7, width), norm, True, dropout_p=0.3)
        yield NormCase(f"{alone}-plain", "test", (65, 127), norm, affine=False)
        yield NormCase(f"{alone}-vector", "test", (197,), norm)
        yield NormCase(f"{alone}-float32", "test", (33, 130), norm, float32_parameters=True)
        yield NormCase(f"{add}-plain", "test", (2, 3, 129), norm, True, affine=False)
        yield NormCase(
            f"{drop}-sum", "test", (2, 33, 65), norm, True, dropout_p=0.5, return_sum=True
        )


def _norm_benches() -> Iterable[NormCase]:
    shapes = [
        (1, 768), (333, 384), (4096, 384), (2048, 768), (2048, 1024), (512, 4096), (256, 8192),
        (128, 16384),
    ]  # fmt: skip
    for norm, (alone, add, drop) in _NORMS.items():
        for rows, width in shapes:
            size = f"{rows}x{width}"
            yield NormCase(f"{alone}-{size}", "bench", (rows, width), norm)
            yield NormCase(f"{add}-{size}", "bench", (rows, width), norm, True)
            yield NormCase(f"{add}-sum-{size}", "bench", (rows, width), norm, True, return_sum=True)
            yield NormCase(f"{drop}-{size}", "bench", (rows, width), norm, True, dropout_p=0.1)


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


CASES: tuple[Case, ...] = (
    *ATTENTION_CASES,
    *DECODE_CASES,
    *_norm_tests(),
    *_norm_benches(),
    *_mlp_tests(),
    *_mlp_benches(),
    *LOSS_CASES,
    *ROTARY_CASES,
    *EMBEDDING_CASES,
    *PROJECTION_CASES,
)


def cases(family: str, use: str) -> list[Case]:
    """Return the cases of one family for "test", "bench" or "long"."""
    return [case for case in CASES if case.family == family and case.use == use]
