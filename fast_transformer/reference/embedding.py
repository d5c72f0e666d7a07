"""The embedding layer of BERT and its family."""

import torch
from torch.nn import functional as F

from fast_transformer.reference.norm import layer_norm
from fast_transformer.reference.philox import dropout


def embedding_norm(
    input_ids, word, position=None, token_type=None, weight=None, bias=None, *, position_ids=None,
    token_type_ids=None, eps=1e-12, dropout_p=0.0, seed=None, padding_idx=None,
    position_padding_idx=None,
):  # fmt: skip
    """dropout(layer_norm(word[id] + type[t] + position[p])), Devlin et al. 2019, figure 2.

    input_ids: (..., T); word, position, token_type: (rows, C). Returns (..., T, C) of word's dtype;
    the sum is taken at float32 or wider.
    """
    wide = torch.promote_types(word.dtype, torch.float32)
    h = F.embedding(input_ids, word, padding_idx).to(wide)
    if token_type is not None:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        h = h + F.embedding(types, token_type).to(wide)
    if position is not None:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
        h = h + F.embedding(position_ids, position, position_padding_idx).to(wide)
    return dropout(layer_norm(h, weight, bias, eps), dropout_p, seed).to(word.dtype)
