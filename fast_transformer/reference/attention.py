"""Scaled dot-product attention with its masks, as the formula reads."""

import torch

from fast_transformer.reference.philox import keep_mask, keep_scale


def attention(
    query,
    key,
    value,
    *,
    scale=None,
    causal=False,
    causal_offset=None,
    key_starts=None,
    key_lengths=None,
    bias=None,
    dropout_p=0.0,
    seed=None,
):
    """dropout(softmax(Q Kᵀ · scale + bias)) V, Vaswani et al. 2017, eq. 1, and its logsumexp.

    query: (batch, heads, T, head_dim); key, value: (batch, heads, S, head_dim).
    causal: row i sees key j iff j ≤ i + causal_offset, which is S − T when not given; an int, or a
    (batch, 1, 1, 1) tensor. key_starts, key_lengths: (batch,); outside [start, length) is no key.
    bias: bool (True = attend) or floating, broadcast to (batch, heads, T, S).
    Returns out like query, and lse (batch, heads, T), float32 or wider. A row that sees no key has
    out 0 and lse −inf, and sends no gradient.
    """
    (batch, heads, T, head_dim), S = query.shape, key.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    column = torch.arange(S, device=query.device)

    if key_starts is not None or key_lengths is not None:
        exists = torch.ones(batch, S, dtype=torch.bool, device=query.device)
        if key_starts is not None:
            exists = exists & (column >= key_starts[:, None])
        if key_lengths is not None:
            exists = exists & (column < key_lengths[:, None])
        # whatever lies there, NaN included, must not reach a product
        key = key.masked_fill(~exists[:, None, :, None], 0)
        value = value.masked_fill(~exists[:, None, :, None], 0)

    scores = (query @ key.mT).to(wide) * scale
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    if key_starts is not None or key_lengths is not None:
        scores = scores.masked_fill(~exists[:, None, None, :], -torch.inf)
    if causal:
        offset = S - T if causal_offset is None else causal_offset
        row = torch.arange(T, device=query.device)[:, None]
        scores = scores.masked_fill(column > row + offset, -torch.inf)

    # a row of −inf alone would turn NaN in softmax: it keeps zeros, and its results are replaced
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    # the largest score apart: torch's gradient of logsumexp is off where that dwarfs the others
    peak = scores.detach().amax(-1) if S > 0 else 0.0 * scores.sum(-1)
    lse = (scores - peak[..., None]).logsumexp(-1) + peak
    lse = lse.masked_fill(empty.squeeze(-1), -torch.inf)
    probs = scores.softmax(-1)
    if dropout_p > 0.0:
        keep = keep_mask(seed, dropout_p, batch, heads, T, S)
        probs = probs.masked_fill(~keep, 0) * keep_scale(dropout_p)
    return (probs.to(value.dtype) @ value).masked_fill(empty, 0), lse


def attention_varlen(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
):
    """Attention within each of the sequences that are packed one after another.

    query: (tokens_q, heads, head_dim); key, value: (tokens_k, heads, head_dim). Sequence b holds
    tokens [cu_seqlens[b], cu_seqlens[b + 1]), at most max_seqlen of them. Every position is one
    within its sequence: of causal (by default S_b − T_b), bias and dropout.
    Returns out like query, and lse (heads, tokens_q).
    """
    q_lengths, k_lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    if options.get("causal_offset") is None:
        options["causal_offset"] = (k_lengths - q_lengths).view(-1, 1, 1, 1)
    out, lse = attention(
        _pad(query, cu_seqlens_q, max_seqlen_q),
        _pad(key, cu_seqlens_k, max_seqlen_k),
        _pad(value, cu_seqlens_k, max_seqlen_k),
        key_lengths=k_lengths,
        **options,
    )
    token = torch.arange(query.shape[0], device=query.device)
    sequence = torch.searchsorted(cu_seqlens_q, token, right=True) - 1
    row = token - cu_seqlens_q[sequence]
    return out[sequence, :, row], lse[sequence, :, row].mT


def _pad(x, cu_seqlens, max_seqlen):
    """(tokens, heads, head_dim) → (batch, heads, max_seqlen, head_dim), with zeros behind."""
    token = cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=x.device)
    zero = x.shape[0]  # the row put behind the last token
    token = token.where(token < cu_seqlens[1:, None], zero)
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[token].transpose(1, 2)
