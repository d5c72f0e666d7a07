"""The cases of gated_mlp and qkv_projection in the table of testing.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fast_transformer.attention_cases import generator


@dataclass(frozen=True)
class GatedMlpCase:
    """One call of gated_mlp (M, C, F, N)."""

    name: str
    use: str
    shape: tuple[int, int, int, int]
    activation: str | None = "silu"
    biased: bool = False
    recompute: bool = False
    family: str = "mlp"
    op: str = "gated_mlp"
    kind: str = "gated_mlp"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        biases = ("b_gate", "b_up", "b_down") if self.biased else ()
        return ("x", "w_gate", "w_up", "w_down", *biases)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name; weights are scaled so that every layer keeps its input's size."""
        M, C, F, N = self.shape
        random = generator(self.name)
        made: dict[str, Any] = {"activation": self.activation, "recompute": self.recompute}
        shapes: dict[str, tuple[int, ...]] = {
            "x": (M, C),
            "w_gate": (F, C),
            "w_up": (F, C),
            "w_down": (N, F),
        }
        if self.biased:
            shapes |= {"b_gate": (F,), "b_up": (F,), "b_down": (N,)}
        for name, shape in shapes.items():
            scale = shape[1] ** -0.5 if name[0] == "w" else 1.0
            made[name] = (torch.randn(shape, generator=random) * scale).to(dtype)
        return made


@dataclass(frozen=True)
class QkvCase:
    """One call of qkv_projection with packed weights.

    shape: batch, length, C, heads, kv_heads, head_dim; without batch, packed sequences.
    """

    name: str
    use: str
    shape: tuple[int, ...]
    biased: bool = True
    family: str = "mlp"
    op: str = "qkv_projection"
    kind: str = "qkv_projection, attention"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        return ("x", "weights", "biases") if self.biased else ("x", "weights")

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        *lead, C, heads, kv_heads, D = self.shape
        random = generator(self.name)
        made: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads}
        rows = (heads + 2 * kv_heads) * D
        made["x"] = torch.randn(*lead, C, generator=random).to(dtype)
        made["weights"] = (torch.randn(rows, C, generator=random) * C**-0.5).to(dtype)
        if self.biased:
            made["biases"] = torch.randn(rows, generator=random).to(dtype)
        return made


def _gated_tests() -> Iterable[GatedMlpCase]:
    shapes = [
        (1, 1, 1, 1), (2, 3, 7, 5), (63, 65, 33, 127), (1, 384, 1536, 384), (16, 80, 65, 33),
        # several units of rows; rows in several chunks, the last of them few
        (401, 70, 300, 40), (2700, 24, 1600, 20), (2113, 24, 2000, 20),
    ]  # fmt: skip
    for shape in shapes:
        yield GatedMlpCase("gated-" + "x".join(map(str, shape)), "test", shape)
    for activation in (None, "gelu", "gelu_tanh", "relu", "silu"):
        yield GatedMlpCase(f"gated-{activation}", "test", (37, 40, 150, 30), activation, True)
    yield GatedMlpCase("gated-recompute", "test", (130, 40, 150, 30), "silu", True, True)


def _gated_benches() -> Iterable[GatedMlpCase]:
    # of SmolLM2-135M, of BERT's width, and of TinyLlama-1.1B
    for width, hidden, rows in (
        (576, 1536, (1, 4, 16, 77, 128, 512, 2048, 4096)),
        (768, 2048, (1, 4, 16, 77, 128, 512, 2048, 4096)),
        (2048, 5632, (1, 16, 128, 512)),
    ):
        for M in rows:
            shape = (M, width, hidden, width)
            yield GatedMlpCase(f"swiglu-{M}x{width}", "bench", shape)
    yield GatedMlpCase("geglu-512x768", "bench", (512, 768, 2048, 768), "gelu_tanh")
    yield GatedMlpCase(
        "swiglu-recompute-512x768", "bench", (512, 768, 2048, 768), recompute=True
    )  # fmt: skip


def _qkv_tests() -> Iterable[QkvCase]:
    for shape in (
        (1, 1, 1, 1, 1, 1), (2, 3, 5, 2, 1, 7), (3, 65, 70, 4, 2, 16), (2, 197, 384, 12, 12, 32),
        (1, 33, 64, 6, 3, 40), (127, 48, 2, 2, 24), (1, 63, 3, 1, 65),
    ):  # fmt: skip
        yield QkvCase("qkv-" + "x".join(map(str, shape)), "test", shape)
    yield QkvCase("qkv-plain", "test", (2, 37, 40, 4, 2, 8), biased=False)


def _qkv_benches() -> Iterable[QkvCase]:
    for B, T, C, heads, kv_heads in (
        (1, 16, 384, 12, 12), (8, 128, 384, 12, 12), (1, 128, 768, 12, 12),
        (8, 128, 768, 12, 12), (2, 512, 768, 12, 12), (1, 512, 2048, 32, 4),
    ):  # fmt: skip
        yield QkvCase(f"qkv-{B}x{T}x{C}", "bench", (B, T, C, heads, kv_heads, C // heads))


PROJECTION_CASES: tuple[GatedMlpCase | QkvCase, ...] = (
    *_gated_tests(),
    *_gated_benches(),
    *_qkv_tests(),
    *_qkv_benches(),
)
