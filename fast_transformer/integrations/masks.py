"""What the attention mask of an encoder says: which positions are padding."""

import torch
from torch import Tensor

from fast_transformer.nn.padding import readable


def broadcast(mask: Tensor) -> Tensor:
    """(batch, length) → (batch, 1, 1, length) bool; a mask of four dimensions stays as it is."""
    return mask.bool()[:, None, None, :] if mask.dim() == 2 else mask


def as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """Return what `ft.attention` takes as bias for queries like `query`."""
    mask = broadcast(mask)
    if mask.dtype in (torch.bool, torch.float32, query.dtype):
        return mask
    return mask.to(query.dtype if query.dtype == torch.float64 else torch.float32)


def padding(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """Find the tokens of a batch in its mask, whatever form transformers gave that.

    A position is padding when no row may attend to it and all rows see the same: then nothing of
    it reaches a token. A mask whose rows differ, or that weighs (neither 0 nor the lowest number),
    marks no padding.

    Args:
        mask: (batch, length), true or 1 where there is a token; or broadcastable to
            (batch, heads, length, length): bool, where True attends, or added to the scores.
        batch, length: of the hidden states.

    Returns:
        (batch, length) bool, True where there is a token; None where the mask is of another kind.
        While the call is traced a mask of another kind is answered with True throughout.
    """
    mask = broadcast(mask)
    if mask.dim() != 4 or mask.shape[-1] != length:
        return None
    row = mask[:, :1, :1]
    lowest = 0.5 * torch.finfo(mask.dtype).min if mask.is_floating_point() else None
    keep = row if lowest is None else row == 0
    alike = (mask == row).all()
    if lowest is not None:
        alike = alike & (keep | (row <= lowest)).all()
    keep = keep.bool()[:, 0, 0].expand(batch, length)
    if readable(mask):
        return keep if bool(alike) else None
    return keep | ~alike
