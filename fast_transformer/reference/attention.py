"""Scaled dot-product attention with its masks, as the formula reads."""

import torch

from fast_transformer.reference.philox import keep_mask, keep_scale


def attention(query, key, value, *, scale=None, key_starts=None, key_lengths=None, **options):
    """dropout(softmax(Q Kᵀ · scale + bias)) V, Vaswani et al. 2017, eq. 1, and its logsumexp.

    query: (batch, heads, T, head_dim); key: (batch, kv_heads, S, head_dim); value: (batch,
    kv_heads, S, value_dim). Head h attends to key head h // (heads / kv_heads).
    key_starts, key_lengths: (batch,); outside [start, length) is no key. options: see `attend`.
    Returns out (batch, heads, T, value_dim) and lse (batch, heads, T), float32 or wider. A row that
    sees no key has out 0 and lse −inf, and sends no gradient.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value, exists = heads_and_keys(query, key, value, key_starts, key_lengths)
    return attend(widened(query @ key.mT) * scale, value, exists, **options)


def widened(x):
    """`x` in float32, or float64 if it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def heads_and_keys(query, key, value, key_starts, key_lengths):
    """A key head for each of query's, zeros where no key is, and where one is.

    The third result is bool (batch, 1, 1, S), or None where all are.
    """
    if key.shape[1] != query.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    if key_starts is None and key_lengths is None:
        return key, value, None
    batch, _, S, _ = key.shape
    column = torch.arange(S, device=query.device)
    exists = torch.ones(batch, S, dtype=torch.bool, device=query.device)
    if key_starts is not None:
        exists = exists & (column >= key_starts[:, None])
    if key_lengths is not None:
        exists = exists & (column < key_lengths[:, None])
    # whatever lies there, NaN included, must not reach a product
    key = key.masked_fill(~exists[:, None, :, None], 0)
    value = value.masked_fill(~exists[:, None, :, None], 0)
    return key, value, exists[:, None, None, :]


def attend(
    scores,
    value,
    exists,
    *,
    causal=False,
    causal_offset=None,
    window=(-1, -1),
    bias=None,
    distance_bias=None,
    alibi_slopes=None,
    softcap=0.0,
    dropout_p=0.0,
    seed=None,
):
    """dropout(softmax(scores with all that is added to them)) V, and the logsumexp.

    scores: (batch, heads, T, S), scaled; value: (batch, heads, S, value_dim).
    softcap: c > 0 makes a score c · tanh(score / c) (Gemma 2), before anything is added.
    bias: bool (True = attend) or floating, broadcast to (batch, heads, T, S).
    distance_bias: (heads, T, S), added. alibi_slopes: (heads,) or (batch, heads); subtracts
    slope · |i + diagonal − j| (ALiBi, Press et al. 2022).
    causal_offset: the diagonal, S − T when not given; an int, or a (batch, 1, 1, 1) tensor.
    causal: row i sees key j iff j ≤ i + diagonal. window: (left, right), −1 for unbounded; row i
    sees key j iff i + diagonal − left ≤ j ≤ i + diagonal + right.
    """
    batch, heads, T, S = scores.shape
    row = torch.arange(T, device=scores.device)[:, None]
    diagonal = S - T if causal_offset is None else causal_offset
    ahead = torch.arange(S, device=scores.device) - row - diagonal  # of the row's diagonal

    if softcap > 0.0:
        scores = (scores / softcap).tanh() * softcap
    if distance_bias is not None:
        scores = scores + distance_bias
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * ahead.abs()
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    if exists is not None:
        scores = scores.masked_fill(~exists, -torch.inf)
    left, right = window
    if causal:
        scores = scores.masked_fill(ahead > 0, -torch.inf)
    if left >= 0:
        scores = scores.masked_fill(ahead < -left, -torch.inf)
    if right >= 0:
        scores = scores.masked_fill(ahead > right, -torch.inf)

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

    query: (tokens_q, heads, head_dim); key, value: (tokens_k, kv_heads, their head_dim). Sequence b
    holds tokens [cu_seqlens[b], cu_seqlens[b + 1]), at most max_seqlen of them. Every position is
    one within its sequence: of the diagonal (by default S_b − T_b), bias and dropout.
    Returns out (tokens_q, heads, value_dim), and lse (heads, tokens_q).
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
