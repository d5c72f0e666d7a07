"""torch.nn.TransformerEncoderLayer on the fused ops."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_transformer.nn import masks
from fast_transformer.nn.attention import (
    MultiheadAttention,
    packable,
    self_attention_packed,
)
from fast_transformer.nn.norm import LayerNorm
from fast_transformer.nn.padding import Packing
from fast_transformer.nn.plain import (
    activation_name,
    any_hooked,
    feed_forward,
    norm,
    plain,
    residual_norm,
    residual_norm_and_sum,
)

Activation = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: the same arguments, parameters, masks and results.

    Residual, dropout and norm are one pass, the perceptron with its activation another. torch.nn's
    own fast path is never taken.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        self.self_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Answer why `module`, a torch.nn.TransformerEncoderLayer, must stay one; None if not."""
        activation = cast(Any, module).activation
        if activation_name(activation) is None:
            name = getattr(activation, "__name__", type(activation).__name__)
            return f"its activation {name} is none of gelu, relu and silu"
        return None

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention and perceptron, each with dropout, residual and norm.

        Args:
            src: (T, batch, d_model), with batch_first (batch, T, d_model), or (T, d_model); or
                nested, without masks.
            src_mask: (T, T) or (batch · heads, T, T); bool, where True forbids, or added.
            src_key_padding_mask: (batch, T), likewise.
            is_causal: a hint that src_mask is the causal mask, which then is not read.

        Returns:
            Shaped like `src`.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        check(
            "TransformerEncoderLayer",
            self,
            src,
            src_mask,
            src_key_padding_mask,
            is_causal,
            ("src_mask", "src_key_padding_mask"),
        )
        if src.is_nested:
            return nested(src, self._run_nested)

        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
                need_weights=False, is_causal=is_causal,
            )  # fmt: skip
            return cast(Tensor, out)

        return self._run(src, attend)

    def packable(self) -> bool:
        """Tell whether the layer can run on packed tokens: nothing has to see the padded batch."""
        attention = self.self_attn
        return (
            type(self) is TransformerEncoderLayer and not any_hooked(self) and _packable(attention)
        )

    def run_packed(self, x: Tensor, packing: Packing, causal: bool) -> Tensor:
        """The layer on packed tokens, (tokens, d_model) → (tokens, d_model)."""
        return self._run(x, lambda x: self_attention_packed(self.self_attn, x, packing, causal))

    def _run_nested(self, x: Tensor, packing: Packing) -> Tensor:
        if _packable(self.self_attn):
            return self.run_packed(x, packing, False)

        def attend(x: Tensor) -> Tensor:  # what is watched or unknown is called, on a padded batch
            x = packing.unpack(x)
            x = x if self.self_attn.batch_first else x.transpose(0, 1)
            out, _ = self.self_attn(
                x, x, x, key_padding_mask=~packing.keep, need_weights=False
            )  # fmt: skip
            return packing.pack(out if self.self_attn.batch_first else out.transpose(0, 1))

        return self._run(x, attend)

    def _run(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer around `attend`, self-attention before its dropout; x: (..., d_model)."""
        if self.norm_first:
            attended = attend(norm(self.norm1, x))
            x, total = residual_norm_and_sum(self.dropout1, self.norm2, attended, x)
            return total + cast(Tensor, self.dropout2(self._perceptron(x)))
        x = residual_norm(self.dropout1, self.norm1, attend(x), x)
        return residual_norm(self.dropout2, self.norm2, self._perceptron(x), x)

    def _perceptron(self, x: Tensor) -> Tensor:
        return feed_forward(self.linear1, self.linear2, self.dropout, self.activation, x)


def nested(src: Tensor, run: Callable[[Tensor, Packing], Tensor]) -> Tensor:
    """Run packed tokens of a nested tensor (batch, ragged, C) and nest the result again."""
    sequences = src.unbind()
    lengths = [len(x) for x in sequences]
    packing = Packing.of_lengths(lengths, src.device)
    out = run(torch.cat(sequences), packing)
    if src.layout == torch.jagged:
        offsets = cast(Any, src).offsets()
        if cast(Any, src).lengths() is None and int(offsets[0]) == 0:
            # of the same ragged shape as src, so that they can be added
            return torch.nested.nested_tensor_from_jagged(out, offsets)
    parts = list(torch.split(out, lengths))
    return torch.nested.as_nested_tensor(parts, layout=src.layout)


def check(
    name: str,
    layer: nn.TransformerEncoderLayer,
    src: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    names: tuple[str, str],
) -> None:
    """Raise unless src and its masks, which `name`'s caller knows as `names`, suit the layer."""
    if src.is_nested:
        for which, given in zip(names, (mask, padding), strict=True):
            if given is not None:
                raise ValueError(f"{name}: {which} must be None where src is nested.")
        return
    attention = layer.self_attn
    if not isinstance(attention, nn.MultiheadAttention):
        return
    width, alone = attention.embed_dim, src.dim() == 2
    if src.dim() not in (2, 3) or src.shape[-1] != width:
        layout = "batch, length" if attention.batch_first else "length, batch"
        raise ValueError(
            f"{name}: src has shape {tuple(src.shape)}; it must be ({layout}, {width}), or "
            f"(length, {width}) for one sequence."
        )
    length, batch = (src.shape[0], 1) if alone else src.shape[:2]
    if attention.batch_first and not alone:
        length, batch = batch, length
    if alone and padding is not None:
        padding = padding.unsqueeze(0)
    masks.check(name, mask, padding, is_causal, (batch, attention.num_heads, length, length), names)


def _packable(attention: nn.Module) -> bool:
    return plain(attention, nn.MultiheadAttention, MultiheadAttention) and packable(
        cast(nn.MultiheadAttention, attention)
    )
