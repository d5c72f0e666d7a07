"""Layer and RMS normalisation, alone and behind a residual connection with dropout."""

import torch

from fast_transformer.reference.philox import dropout


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    """(x − mean) / √(variance + eps) · weight + bias over the last dimension, Ba et al. 2016.

    x: (..., C); weight, bias: (C,), x's dtype or float32. Returns x's shape and dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed.to(x.dtype)


def rms_norm(x, weight=None, eps=1e-6):
    """(x / √(mean(x²) + eps)) · weight over the last dimension, Zhang and Sennrich 2019, eq. 4.

    x: (..., C); weight: (C,), x's dtype or float32. Returns x's shape and dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight
    return normed.to(x.dtype)


def add_norm(
    x, residual, weight=None, bias=None, *, norm="layer_norm", eps=1e-5, dropout_p=0.0, seed=None
):
    """norm(h) and h = residual + dropout(x), h rounded to x's dtype.

    x, residual: (..., C) of one dtype. Dropout counts the rows of x in order.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = (residual.to(wide) + dropout(x.to(wide), dropout_p, seed)).to(x.dtype)
    if norm == "rms_norm":
        return rms_norm(h, weight, eps), h
    return layer_norm(h, weight, bias, eps), h
