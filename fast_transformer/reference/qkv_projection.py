"""What attention reads of its input."""

from torch.nn.functional import linear


def qkv_projection(x, weights, biases=(None, None, None), *, heads, kv_heads):
    """(x Wqᵀ + bq, x Wkᵀ + bk, x Wvᵀ + bv) by heads, Vaswani et al. 2017, section 3.2.2.

    x: (B, T, C) → (B, H, T, D); or (tokens, C) → (tokens, H, D). weights: (H · D, C), and twice
    (kv_heads · D, C).
    """
    projected = (linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    by_heads = (
        y.unflatten(-1, (n, -1))
        for y, n in zip(projected, (heads, kv_heads, kv_heads), strict=True)
    )
    return tuple(y.transpose(1, 2) if x.dim() == 3 else y for y in by_heads)
