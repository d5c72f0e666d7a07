"""torch.nn's masks, where True forbids, as the arguments of ft.attention, where True attends."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_transformer.nn.padding import readable


class Masks(NamedTuple):
    """What forbids attention from (batch, heads, T) rows to S keys; each part may be absent.

    attention: broadcastable to (batch, heads, T, S), bool (True attends) or added to the scores.
    padding: (batch, S), likewise.
    causal: row i sees key j iff j <= i.
    """

    attention: Tensor | None = None
    padding: Tensor | None = None
    causal: bool = False

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of ft.attention; padding at an end becomes a range of keys."""
        options: dict[str, Any] = {"causal": self.causal}
        if self.causal:
            options["causal_offset"] = 0
        padding = self.padding
        if padding is not None and padding.dtype == torch.bool:
            bounds = _bounds(padding)
            if bounds is not None:
                options |= bounds
                padding = None
        bias = _both(self.attention, padding)
        if bias is not None:
            if bias.dtype not in (torch.bool, torch.float32, dtype):
                bias = bias.to(dtype)
            options["bias"] = bias
        return options

    def added(self, T: int, S: int, like: Tensor) -> Tensor:
        """All of it as numbers to add to the scores, broadcastable to (batch, heads, T, S)."""
        allowed = torch.ones(T, S, dtype=torch.bool, device=like.device)
        mask = _both(self.attention, self.padding)
        mask = _join(mask, allowed.tril() if self.causal else allowed)
        return _numbers(mask) if mask.dtype == torch.bool else mask

    def extended(self, keys: int) -> "Masks":
        """The same with `keys` further keys behind, which every row may attend to."""
        if keys == 0:
            return self
        return Masks(
            None if self.attention is None else _padded(self.attention, keys),
            None if self.padding is None else _padded(self.padding, keys),
            self.causal,
        )


def _padded(mask: Tensor, keys: int) -> Tensor:
    return F.pad(mask, (0, keys), value=True if mask.dtype == torch.bool else 0.0)


def _both(attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
    if padding is None:
        return attention
    padding = padding[:, None, None, :]
    return padding if attention is None else _join(attention, padding)


def _join(mask: Tensor | None, other: Tensor) -> Tensor:
    """Both at once: and for bools, a sum as soon as one holds numbers."""
    if mask is None:
        return other
    if mask.dtype == torch.bool and other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool:
        mask, other = other, mask
    if other.dtype == torch.bool:
        return mask.masked_fill(~other, -torch.inf)
    return mask + other


def _numbers(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)


def _bounds(padding: Tensor) -> dict[str, Tensor] | None:
    """key_lengths or key_starts where the padding lies at one end; values are read."""
    if not readable(padding):
        return None
    lengths = padding.sum(1)
    key = torch.arange(padding.shape[1], device=padding.device)
    if torch.equal(padding, key < lengths[:, None]):
        return {"key_lengths": lengths}
    starts = padding.shape[1] - lengths
    return {"key_starts": starts} if torch.equal(padding, key >= starts[:, None]) else None


def from_torch(
    name: str,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    shape: tuple[int, int, int, int],
) -> Masks:
    """Check torch.nn's masks against shape (batch, heads, T, S) and turn them round.

    attn_mask: (T, S) or (batch · heads, T, S); key_padding_mask: (batch, S). Both bool, where True
    forbids, or floating, added to the scores. is_causal says that attn_mask is the causal one.
    """
    check(name, attn_mask, key_padding_mask, is_causal, shape)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(shape)
    return Masks(
        None if attn_mask is None or is_causal else _turned(attn_mask),
        None if key_padding_mask is None else _turned(key_padding_mask),
        is_causal,
    )


def check(
    name: str,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    shape: tuple[int, int, int, int],
    names: tuple[str, str] = ("attn_mask", "key_padding_mask"),
) -> None:
    """Raise unless the masks, which the caller knows as `names`, suit (batch, heads, T, S)."""
    B, H, T, S = shape
    for mask, which in zip((attn_mask, key_padding_mask), names, strict=True):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"{name}: {which} has dtype {str(mask.dtype).removeprefix('torch.')}; accepted are "
                "bool, where True forbids, and floating, which is added."
            )
    if key_padding_mask is not None and key_padding_mask.shape != (B, S):
        raise ValueError(
            f"{name}: {names[1]} has shape {tuple(key_padding_mask.shape)}; it must be "
            f"(batch, S) = {(B, S)}."
        )
    if is_causal and attn_mask is None:
        raise ValueError(f"{name}: is_causal is a hint about {names[0]}, which is not given.")
    if attn_mask is not None and attn_mask.shape not in ((T, S), (B * H, T, S)):
        raise ValueError(
            f"{name}: {names[0]} has shape {tuple(attn_mask.shape)}; it must be (T, S) = "
            f"{(T, S)} or (batch · heads, T, S) = {(B * H, T, S)}."
        )


def _turned(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask
