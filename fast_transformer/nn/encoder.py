"""torch.nn.TransformerEncoder, which never computes padding."""

from typing import cast

import torch
from torch import Tensor, nn

from fast_transformer.nn.encoder_layer import TransformerEncoderLayer, check, nested
from fast_transformer.nn.padding import Packing, readable
from fast_transformer.nn.plain import is_norm, norm


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: the same arguments, parameters, masks and results.

    Where there is a padding mask, the tokens are packed once, run through every layer, and unpacked
    behind the last one: rows that are padding come out as zeros, in training and in inference.
    """

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Answer why `module`, a torch.nn.TransformerEncoder, must stay one; None if not."""
        for layer in cast(nn.TransformerEncoder, module).layers:
            if type(layer) not in (nn.TransformerEncoderLayer, TransformerEncoderLayer):
                return f"its layers are of the class {type(layer).__name__}"
            reason = TransformerEncoderLayer.unsupported(layer)
            if reason is not None:
                return f"its layers cannot be taken over: {reason}"
        return None

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run the layers one after the other, and the final norm if there is one.

        Args:
            src: (T, batch, d_model), with batch_first (batch, T, d_model), or (T, d_model); or
                nested, without masks.
            mask: (T, T) or (batch · heads, T, T); bool, where True forbids, or added.
            src_key_padding_mask: (batch, T), likewise.
            is_causal: whether mask is the causal mask; by default it is looked at.

        Returns:
            Shaped like `src`.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        causal = _is_causal(mask) if is_causal is None else is_causal
        if self.layers:
            check(
                "TransformerEncoder",
                cast(nn.TransformerEncoderLayer, self.layers[0]),
                src,
                mask,
                src_key_padding_mask,
                causal,
                ("mask", "src_key_padding_mask"),
            )
        packs = all(isinstance(x, TransformerEncoderLayer) and x.packable() for x in self.layers)
        if src.is_nested and packs:
            return nested(src, lambda x, packing: self._finish(self._packed(x, packing, False)))
        batch_first = (
            bool(self.layers) and cast(nn.MultiheadAttention, self.layers[0].self_attn).batch_first
        )
        keep = _tokens(src_key_padding_mask)
        if keep is not None and src.dim() == 3 and packs and (mask is None or causal):
            x = src if batch_first else src.transpose(0, 1)
            if not bool(keep.all()):
                packing = Packing(keep)
                x = packing.pack(x)
                x = self._packed(x, packing, causal)
                if self.norm is None or is_norm(self.norm):
                    x = packing.unpack(self._finish(x))
                else:  # a norm that is watched sees the batch as it would
                    x = self._finish(packing.unpack(x)).masked_fill(~keep[..., None], 0.0)
                return x if batch_first else x.transpose(0, 1)
            src_key_padding_mask = None
        # what lies in padding, NaN included, must not reach a product
        x = _without_padding(src, src_key_padding_mask, batch_first)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        if x.is_nested:
            return nested(x, lambda x, _: self._finish(x))
        return _without_padding(self._finish(x), src_key_padding_mask, batch_first)

    def _packed(self, x: Tensor, packing: Packing, causal: bool) -> Tensor:
        for layer in self.layers:
            x = cast(TransformerEncoderLayer, layer).run_packed(x, packing, causal)
        return x

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.norm is None else norm(self.norm, x)


def _tokens(padding: Tensor | None) -> Tensor | None:
    """(batch, T), True where there is a token; None where there is no telling before the layers."""
    if padding is None or not readable(padding):
        return None
    if padding.dtype == torch.bool:
        return ~padding
    if not padding.is_floating_point():
        return None  # the layers have an error for it
    keep = padding == 0
    return keep if bool((keep | (padding == -torch.inf)).all()) else None


def _is_causal(mask: Tensor | None) -> bool:
    """Tell whether `mask` forbids the future and nothing else; values are read."""
    if mask is None or mask.dim() != 2 or not readable(mask):
        return False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.is_floating_point():
        return torch.equal(mask, torch.zeros_like(mask).masked_fill(future, -torch.inf))
    return mask.dtype == torch.bool and torch.equal(mask, future)


def _without_padding(x: Tensor, padding: Tensor | None, batch_first: bool) -> Tensor:
    """Zeros where there is padding, as behind a packed run."""
    if padding is None or x.is_nested:
        return x
    drop = padding if padding.dtype == torch.bool else padding == -torch.inf
    if x.dim() == 3 and not batch_first:
        drop = drop.transpose(0, 1)
    return x.masked_fill(drop[..., None], 0.0)
