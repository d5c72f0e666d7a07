"""What an attention mask says: which positions are padding, and which keys a decoder's rows see."""

from typing import NamedTuple

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


class Keys(NamedTuple):
    """The keys that the rows of a decoder see, causality apart; all fields None means all of them.

    starts, lengths: (batch,) int32, of the one run of tokens that each sequence has.
    bias: (batch, 1, 1, keys) bool, where the tokens are no single run, or cannot be looked at.
    """

    starts: Tensor | None = None
    lengths: Tensor | None = None
    bias: Tensor | None = None

    @property
    def all(self) -> bool:
        """Whether there is no padding."""
        return self.starts is None and self.lengths is None and self.bias is None

    @classmethod
    def of(cls, mask: Tensor | None) -> "Keys":
        """mask: (batch, keys), true or not 0 where there is a token; None where all are tokens."""
        if mask is None:
            return cls()
        keep = mask.bool()
        if not readable(mask):
            return cls(bias=keep[:, None, None, :])
        if bool(keep.all()):
            return cls()
        total = keep.sum(1, dtype=torch.int32)
        first = keep.byte().argmax(1).to(torch.int32)
        run = torch.arange(keep.shape[1], device=keep.device)
        within = (run >= first[:, None]) & (run < (first + total)[:, None])
        if not torch.equal(within, keep):
            return cls(bias=keep[:, None, None, :])
        left, right = bool(keep[:, -1].all()), bool(keep[:, 0].all())
        return cls(None if right else first, None if left else first + total)
