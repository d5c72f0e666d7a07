"""Attention over some of the keys, put together again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fast_transformer.ops import arguments


def merge_attention(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from `attention` over disjoint shards of them.

    With weights exp(lse_n − lse) and lse = log Σ_n exp(lse_n), out = Σ_n weight_n · out_n: the
    softmax over all keys regrouped (Rabe & Staats 2021, § 2). Plain PyTorch, differentiable.

    Args:
        outs: (n, batch, heads, T, head_dim), or a sequence of n tensors without the first
            dimension: what `attention` gave for each shard. Other dimensions will do as well.
        lses: the same without head_dim: their logsumexps, float32, or float64 where outs is.

    Returns:
        out in outs' dtype, and lse as lses. Where a shard's lse is −inf it counts for nothing; a
        row for which all are gives zeros and −inf, and no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    out, lse = _stacked("outs", outs), _stacked("lses", lses)
    arguments.floating("merge_attention", "outs", out)
    wide = torch.promote_types(out.dtype, torch.float32)
    if lse.dtype not in (torch.float32, wide):
        raise TypeError(
            f"merge_attention: lses has dtype {arguments.short(lse.dtype)}; accepted is float32, "
            "and float64 where outs is float64."
        )
    arguments.same_device("merge_attention", "lses", lse, "outs", out)
    if lse.shape != out.shape[:-1]:
        raise ValueError(
            f"merge_attention: lses has shape {tuple(lse.shape)}; outs, which has "
            f"{tuple(out.shape)}, asks for {tuple(out.shape[:-1])}."
        )
    if out.shape[0] == 0:
        raise ValueError("merge_attention: outs holds no shard; it must hold at least one.")

    absent = lse.isneginf()
    empty = absent.all(0)
    # what follows must not meet −inf − −inf or log 0, in its gradient neither
    peak = lse.detach().amax(0).masked_fill(empty, 0)
    shares = (lse - peak).exp()
    total = shares.sum(0).masked_fill(empty, 1)
    weights = (shares / total).unsqueeze(-1)
    merged = (weights * out.masked_fill(absent.unsqueeze(-1), 0).to(wide)).sum(0)
    return merged.to(out.dtype), (total.log() + peak).masked_fill(empty, -torch.inf)


def _stacked(name, shards):
    """One tensor from the shards, of one shape and dtype."""
    if isinstance(shards, Tensor):
        if shards.dim() == 0:
            raise ValueError(f"merge_attention: {name} has no dimension; the first is the shards'.")
        return shards
    if not isinstance(shards, Sequence) or not all(isinstance(x, Tensor) for x in shards):
        got = type(shards).__name__
        raise TypeError(
            f"merge_attention: {name} must be a tensor or a sequence of tensors, got {got}."
        )
    if len(shards) == 0:
        raise ValueError(f"merge_attention: {name} holds no shard; it must hold at least one.")
    for n, x in enumerate(shards):
        arguments.like("merge_attention", f"{name}[{n}]", x, f"{name}[0]", shards[0])
        if x.shape != shards[0].shape:
            raise ValueError(
                f"merge_attention: {name}[{n}] has shape {tuple(x.shape)} but {name}[0] has "
                f"{tuple(shards[0].shape)}; they must match."
            )
    return torch.stack(tuple(shards))
