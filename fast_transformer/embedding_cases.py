"""The cases of embedding_norm in the table of testing.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fast_transformer.attention_cases import generator


@dataclass(frozen=True)
class EmbeddingCase:
    """One call of embedding_norm.

    shape: batch, length, words, C; with as many positions as it needs. types: rows of token_type;
    0 for none. own_positions: position_ids are given. common: half of the tokens are this word.
    """

    name: str
    use: str
    shape: tuple[int, int, int, int]
    types: int = 2
    positions: bool = True
    own_positions: bool = False
    affine: bool = True
    common: int | None = None
    padding_idx: int | None = 0
    dropout_p: float = 0.0
    float32_parameters: bool = False
    family: str = "embedding"
    op: str = "embedding_norm"

    @property
    def kind(self) -> str:
        """With dropout or without."""
        return "embedding_norm, dropout" if self.dropout_p > 0 else "embedding_norm"

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        tables = ("word",) + ("position",) * self.positions + ("token_type",) * (self.types > 0)
        return tables + (("weight", "bias") if self.affine else ())

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments by name."""
        B, T, V, C = self.shape
        random = generator(self.name)
        ids = torch.randint(0, V, (B, T), generator=random)
        if self.common is not None:
            ids[torch.rand(B, T, generator=random) < 0.5] = self.common
        made: dict[str, Any] = {"input_ids": ids, "padding_idx": self.padding_idx}
        made["word"] = torch.randn(V, C, generator=random).to(dtype)
        if self.positions:
            made["position"] = torch.randn(T + 3, C, generator=random).to(dtype)
            if self.own_positions:
                made["position_ids"] = torch.randint(0, T + 3, (B, T), generator=random)
                made["position_padding_idx"] = 1
        if self.types:
            made["token_type"] = torch.randn(self.types, C, generator=random).to(dtype)
            made["token_type_ids"] = torch.randint(0, self.types, (B, T), generator=random)
        if self.affine:
            own = torch.float32 if self.float32_parameters else dtype
            made["weight"] = (1 + torch.randn(C, generator=random)).to(own)
            made["bias"] = torch.randn(C, generator=random).to(own)
        if self.dropout_p > 0:
            made["dropout_p"], made["seed"] = self.dropout_p, torch.tensor(20181011)
        return made


def _embedding_tests() -> Iterable[EmbeddingCase]:
    shapes = [
        (1, 1, 1, 1), (2, 3, 5, 63), (3, 65, 127, 65), (2, 127, 40, 197), (5, 33, 1000, 384),
        (1, 7, 9, 1024),
    ]  # fmt: skip
    for shape in shapes:
        size = "x".join(map(str, shape))
        yield EmbeddingCase(f"embedding-{size}", "test", shape, padding_idx=None)
        yield EmbeddingCase(f"embedding-dropout-{size}", "test", shape, dropout_p=0.3)
    # rows that hundreds of tokens chose, next to others that none did
    yield EmbeddingCase("embedding-common", "test", (9, 130, 50, 130), common=7)
    yield EmbeddingCase("embedding-common-padding", "test", (9, 130, 50, 70), common=0)
    yield EmbeddingCase("embedding-positions", "test", (3, 40, 50, 70), own_positions=True)
    yield EmbeddingCase("embedding-word-alone", "test", (3, 40, 50, 70), 0, False)
    yield EmbeddingCase("embedding-plain", "test", (3, 40, 50, 70), affine=False)
    yield EmbeddingCase("embedding-types", "test", (3, 40, 50, 70), 19)
    yield EmbeddingCase("embedding-float32", "test", (3, 40, 50, 70), float32_parameters=True)


def _embedding_benches() -> Iterable[EmbeddingCase]:
    for B, T, C in ((1, 32, 384), (1, 128, 384), (8, 128, 384), (32, 128, 384), (8, 128, 768),
                    (8, 512, 768)):  # fmt: skip
        size = f"B{B}-T{T}-C{C}"
        yield EmbeddingCase(f"embedding-{size}", "bench", (B, T, 30522, C))
        yield EmbeddingCase(f"embedding-dropout-{size}", "bench", (B, T, 30522, C), dropout_p=0.1)


EMBEDDING_CASES: tuple[EmbeddingCase, ...] = (*_embedding_tests(), *_embedding_benches())
