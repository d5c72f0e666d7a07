"""Rotary position embeddings."""

import torch


def rotary(query, key, cos, sin, *, interleaved=False):
    """Turn each pair of columns (a, b) by its position's angle, Su et al. 2021, eq. 34.

    query: (B, H, T, D); key: (B, kv_heads, T, D) or None; cos, sin: (T, R/2) or (B, T, R/2).
    Returns both, of their shapes and dtypes; columns from R on pass through.
    """
    return tuple(x if x is None else _turn(x, cos, sin, interleaved) for x in (query, key))


def _turn(x, cos, sin, interleaved):
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = cos.shape[-1]
    cos, sin = (table.to(wide).unsqueeze(-3) for table in (cos, sin))  # the same for every head
    split, axis = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    a, b = x[..., : 2 * pairs].to(wide).unflatten(-1, split).unbind(axis)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 2 * pairs :]), -1)
