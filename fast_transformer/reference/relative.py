"""Attention whose scores know how far a key lies from its query, as the papers' formulas read."""

import torch

from fast_transformer.reference.attention import attend, heads_and_keys, widened


def relative_attention(
    query,
    key,
    value,
    *,
    position_key=None,
    position_zero=0,
    content_bias=None,
    position_bias=None,
    segment_key=None,
    segment_bias=None,
    query_segments=None,
    key_segments=None,
    distance_bias=None,
    scale=None,
    key_starts=None,
    key_lengths=None,
    **options,
):
    """Attention by content, distance and segment: Dai et al. 2019, eq. 4; Yang et al. 2019, § 2.5.

    The score of query i and key j, with p = position_zero + j − i and s = 0 where both have the
    same segment, else 1:

        scale · ((q_i + content_bias) · k_j + (q_i + position_bias) · position_key[p]
                 + (q_i + segment_bias) · segment_key[s])

    position_key: (L, heads, head_dim); the three biases: (heads, head_dim); segment_key: (2, heads,
    head_dim); query_segments (batch, T) and key_segments (batch, S), integers; distance_bias:
    (heads | 1, L), whose [h, p] is added to the score. Rows p that do not exist belong to pairs
    that see nothing of each other. The rest, options included, as for `attention`.
    """
    T, S = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    column, row = (torch.arange(n, device=query.device) for n in (S, T))
    p = position_zero + column - row[:, None]
    key, value, exists = heads_and_keys(query, key, value, key_starts, key_lengths)

    scores = widened(_plus(query, content_bias) @ key.mT)
    if position_key is not None:
        by_row = _plus(query, position_bias) @ position_key.permute(1, 2, 0)  # (B, H, T, L)
        p_of_row = p.clamp(0, position_key.shape[0] - 1).expand(*by_row.shape[:2], T, S)
        scores = scores + widened(by_row).gather(-1, p_of_row)
    if segment_key is not None:
        both = widened(_plus(query, segment_bias) @ segment_key.permute(1, 2, 0))  # (B, H, T, 2)
        same = query_segments[:, None, :, None] == key_segments[:, None, None, :]
        scores = scores + torch.where(same, both[..., :1], both[..., 1:])
    if distance_bias is not None:
        p = p.clamp(0, distance_bias.shape[1] - 1)
        options["distance_bias"] = widened(distance_bias)[:, p]
    return attend(scores * scale, value, exists, **options)


def _plus(query, bias):
    """Query (batch, heads, T, head_dim) + bias (heads, head_dim), if there is one."""
    return query if bias is None else query + bias[:, None]
