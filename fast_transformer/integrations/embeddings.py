"""The embedding layers of transformers' BERT family: three tables and a norm in one pass."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fast_transformer.nn.plain import hooked, is_norm, plain
from fast_transformer.ops import embedding_norm

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class Embeddings(nn.Module):
    """word + token type + position, norm, dropout; what the families call <name>Embeddings."""

    LayerNorm: Any
    dropout: Any
    word_embeddings: Any
    position_embeddings: Any
    token_type_embeddings: Any

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Return why these stock embeddings cannot be taken over, or None."""
        positions = getattr(module, "position_embedding_type", "absolute")
        return None if positions == "absolute" else f"position_embedding_type is {positions!r}"

    def costs(self) -> Iterator[tuple[str, str]]:
        """(child, what its being special costs), for `explain`."""
        for name, child in self.named_children():
            if not _fits(name, child):
                kind = type(child).__name__
                what = f"is {kind}"
                if hooked(child):
                    own = "forward" in child.__dict__
                    what = f"{kind} has {'a forward of its own' if own else 'hooks'}"
                alone = name == TABLES[0]
                cost = "called as a module" if alone else "the embeddings run step by step"
                yield name, f"{what}: {cost}"

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """(batch, length) ids → (batch, length, C)."""
        stock = super().forward
        if (
            input_ids is None
            or input_ids.dim() != 2
            or any(isinstance(x, Tensor) or x for x in (*args, *kwargs.values()))
            or not all(_fits(n, child) for n, child in self.named_children() if n != TABLES[0])
        ):
            return stock(input_ids, token_type_ids, position_ids, *args, **kwargs)  # type: ignore[no-any-return]
        # RoBERTa counts from behind its padding
        count = getattr(self, "create_position_ids_from_input_ids", None)
        if position_ids is None and count is not None:
            position_ids = count(input_ids, self.padding_idx)
        word, position, token_type = (getattr(self, name) for name in TABLES)
        norm, dropout = self.LayerNorm, self.dropout
        if _fits(TABLES[0], word):
            words, padding_idx = word.weight, word.padding_idx
        else:  # each token's row is made, and chosen by that token
            embeds, padding_idx = word(input_ids), None
            if embeds.dtype != position.weight.dtype:
                return stock(None, token_type_ids, position_ids, embeds)  # type: ignore[no-any-return]
            words = embeds.flatten(0, 1)
            input_ids = torch.arange(words.shape[0], device=words.device).view(input_ids.shape)
        return embedding_norm(
            input_ids, words, position.weight, token_type.weight, norm.weight, norm.bias,
            position_ids=position_ids, token_type_ids=token_type_ids, eps=norm.eps,
            dropout_p=dropout.p if dropout.training else 0.0, padding_idx=padding_idx,
            position_padding_idx=position.padding_idx,
        )  # fmt: skip


def _fits(name: str, child: Any) -> bool:
    if name in TABLES:
        return (
            plain(child, nn.Embedding)
            and child.max_norm is None
            and not child.sparse
            and not child.scale_grad_by_freq
            and (child.padding_idx is None or name != TABLES[2])
        )
    return is_norm(child) if name == "LayerNorm" else plain(child, nn.Dropout)


def sample(module: Any) -> tuple[Tensor, ...]:
    """Ids for a self-check."""
    return (torch.arange(10).view(2, 5) % module.word_embeddings.num_embeddings,)
