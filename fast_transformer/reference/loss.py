"""Cross-entropy of logits, and of the logits that a linear layer makes."""

import torch
from torch.nn.functional import linear


def cross_entropy(
    logits, target, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean"
):
    """−Σ q log softmax(logits) + z_loss · logsumexp(logits)², q = (1 − ε) one-hot + ε / V.

    ε = label_smoothing, Szegedy et al. 2016, section 7; z_loss: Chowdhery et al. 2022, section 5.
    logits: (..., V); target: (...). Returns float32, or float64 of float64.
    """
    counted = target != ignore_index
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide.masked_fill(~counted[..., None], 0)  # what is there may be NaN
    log_p = wide.log_softmax(-1)
    loss = -log_p.gather(-1, target.masked_fill(~counted, 0)[..., None])[..., 0]
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    if z_loss != 0:
        loss = loss + z_loss * wide.logsumexp(-1).square()
    loss = loss.masked_fill(~counted, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def linear_cross_entropy(hidden, weight, target, *, bias=None, **options):
    """cross_entropy(hidden weightᵀ + bias, target).

    hidden: (..., C); weight: (V, C); bias: (V,); options: of cross_entropy.
    """
    counted = (target != options.get("ignore_index", -100))[..., None]
    return cross_entropy(linear(hidden.masked_fill(~counted, 0), weight, bias), target, **options)
