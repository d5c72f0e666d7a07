"""embedding_norm against F.embedding three times, F.layer_norm and dropout."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import embedding_norm
from fast_transformer.testing import EmbeddingCase, cases

SUITE = "embedding"
CASES = cases("embedding", "bench")
PEERS = ("pytorch",)


def contest(case: EmbeddingCase, dtype: str) -> Contest:
    """Ours and PyTorch's, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype])
    B, T, V, C = case.shape
    row = C * inputs["word"].element_size()
    # forward reads a word's row for each token and writes out; backward reads the row and dout, and
    # writes a gradient for every word there is. Positions and types stay in cache.
    moved = (2 * B * T * row, (2 * B * T + V) * row)
    plain = Entry(step_by_step, {k: v for k, v in inputs.items() if k != "seed"}, case.wrt)
    return Contest(
        case, dtype, Entry(embedding_norm, inputs, case.wrt), {"pytorch": plain}, bytes=moved,
        judged=replace(case, shape=(B, T, min(V, 1000), C)),  # in float64
    )  # fmt: skip


def step_by_step(
    input_ids, word, position, token_type, token_type_ids, weight, bias, padding_idx, dropout_p=0.0
):
    """As transformers' BERT has it."""
    h = F.embedding(input_ids, word, padding_idx) + F.embedding(token_type_ids, token_type)
    h = h + F.embedding(torch.arange(input_ids.shape[-1])[None], position)
    out = F.layer_norm(h, weight.shape, weight, bias, 1e-12)
    return F.dropout(out, dropout_p) if dropout_p > 0 else out
