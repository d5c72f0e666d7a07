"""Layers whose weights were prepared once for many calls: as panels, or as int8 with scales.

Modules hold such weights (`fast_transformer.nn.packed_weights`); the public functions never do,
since a function cannot know whether its weight is still the one that was packed.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fast_transformer.backends import Backend, choose
from fast_transformer.ops import cpu
from fast_transformer.ops.linear_arguments import CODES


class PackedWeight(NamedTuple):
    """What the CPU kernels read in place of a weight (out, in).

    data: int8; the panels that a product streams, or with `scale` (out, in). scale: (out,) float32,
    or None. error: the largest deviation from the weight, relative to its row's largest element.
    """

    data: Tensor
    scale: Tensor | None
    out_features: int
    error: float

    @property
    def nbytes(self) -> int:
        """What it takes beside the parameter, in bytes."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


def packable(weight: Tensor) -> bool:
    """Tell whether the CPU kernels can pack `weight`: a plain (out, in) tensor of theirs."""
    return (
        (type(weight) is Tensor or type(weight) is Parameter)
        and weight.dim() == 2
        and weight.numel() > 0
        and cpu.unsupported((weight,)) is None
    )


@torch.no_grad()
def pack(weight: Tensor, int8: bool = False) -> PackedWeight:
    """Prepare a weight (out, in) that is `packable`.

    int8: round each row to whole multiples of a 127th of its largest element (symmetric, one scale
    for each output).
    """
    weight = weight.detach()
    if not int8:
        return PackedWeight(_pack_weight(cpu.unit_stride(weight)), None, weight.shape[0], 0.0)
    wide = weight.float()
    largest = wide.abs().amax(1)
    scale = largest / 127
    rounded = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
    error = (rounded * scale[:, None] - wide).abs().amax(1) / largest.clamp_min(1e-30)
    return PackedWeight(rounded.to(torch.int8), scale, weight.shape[0], error.max().item())


def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, *, activation: str | None = None
) -> Tensor:
    """linear_act on a packed weight, without a gradient: (..., in) → (..., out)."""
    choose("packed_linear", _LINEAR, (x, weight.data, bias))
    code = CODES[activation]
    return _linear(
        cpu.uniform_rows(x), weight.data, weight.scale, bias, weight.out_features, code
    )  # fmt: skip


def packed_mlp(
    x: Tensor,
    w1: PackedWeight,
    b1: Tensor | None,
    w2: PackedWeight,
    b2: Tensor | None,
    *,
    activation: str | None,
) -> Tensor:
    """Mlp on packed weights, without dropout or a gradient: (..., in) → (..., out)."""
    choose("packed_mlp", _MLP, (x, w1.data, b1, w2.data, b2))
    return _mlp(
        cpu.uniform_rows(x), w1.data, w1.scale, b1, w2.data, w2.scale, b2, w1.out_features,
        w2.out_features, CODES[activation],
    )  # fmt: skip


_pack_weight = cpu.operator("pack_weight")
_linear, _mlp = cpu.operator("packed_linear"), cpu.operator("packed_mlp")
_LINEAR = {"cpu": Backend(_linear, None, cpu.unsupported)}
_MLP = {"cpu": Backend(_mlp, None, cpu.unsupported)}


@cpu.fake("packed_linear")
def _linear_fake(x, weight, scale, bias, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@cpu.fake("packed_mlp")
def _mlp_fake(x, w1, scale1, b1, w2, scale2, b2, hidden_features, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)
