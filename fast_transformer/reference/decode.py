"""Attention of a few query rows on a cache of keys and values, as the formula reads."""

import torch


def attention_decode(
    query,
    key_cache,
    value_cache,
    cache_lengths,
    *,
    new_key=None,
    new_value=None,
    block_table=None,
    scale=None,
    causal=True,
    window=(-1, -1),
    alibi_slopes=None,
    softcap=0.0,
):
    """softmax(cap(Q Kᵀ · scale) − slope · |distance|) V over a cache, and its logsumexp.

    query: (batch, heads, T, head_dim). key_cache, value_cache: (batch, kv_heads, S, dim), or with
    block_table (batch, max_blocks) (blocks, kv_heads, block_size, dim), where key j of sequence b
    is row j % block_size of block block_table[b, j // block_size]. new_key, new_value:
    (batch, kv_heads, n, dim), written into the caches, in place, from cache_lengths[b] on; then
    the sequence has cache_lengths[b] + n keys, and row i stands at position i + keys − T.
    Head h reads the keys of head h // (heads / kv_heads). causal: no key behind the position;
    window: at most so many keys to the left and to the right of it, −1 any number.
    alibi_slopes: (heads,) or (batch, heads). softcap: c · tanh(score / c), Gemma 2, unless 0.
    Returns out (batch, heads, T, value's dim), and lse (batch, heads, T), float32 or wider.
    """
    (_, heads, T, head_dim), kv_heads = query.shape, key_cache.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = cache_lengths.long()
    if new_key is not None:
        position = keys[:, None] + torch.arange(new_key.shape[2], device=query.device)
        block, row = _place(position, key_cache.shape[2], block_table)
        key_cache[block, :, row] = new_key.transpose(1, 2)
        value_cache[block, :, row] = new_value.transpose(1, 2)
        keys = keys + new_key.shape[2]

    key, value = _sequences(key_cache, block_table), _sequences(value_cache, block_table)
    column = torch.arange(key.shape[2], device=query.device)
    exists = column < keys[:, None]
    # whatever lies in the rest of the cache, NaN included, must not reach a product
    key, value = (x.masked_fill(~exists[:, None, :, None], 0) for x in (key, value))
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))

    position = torch.arange(T, device=query.device) + keys[:, None] - T  # (batch, T)
    distance = position[:, None, :, None] - column  # (batch, 1, T, S)
    scores = (query @ key.mT).to(wide) * scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide).view(-1, heads, 1, 1)
        scores = scores - slopes * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    seen = exists[:, None, None, :]
    if left >= 0:
        seen = seen & (distance <= left)
    if right >= 0:
        seen = seen & (distance >= -right)
    scores = scores.masked_fill(~seen, -torch.inf)

    # a row of −inf alone would turn NaN in softmax: it keeps zeros, and its results are replaced
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).masked_fill(empty, 0), lse


def _place(position, block_size, block_table):
    """Where position (batch, n) of each sequence lies in a cache: its block, and the row there."""
    if block_table is None:
        return torch.arange(position.shape[0], device=position.device)[:, None], position
    return block_table.long().gather(1, position // block_size), position % block_size


def _sequences(cache, block_table):
    """The cache as (batch, kv_heads, room, dim)."""
    if block_table is None:
        return cache
    table = block_table.long().clamp(0, cache.shape[0] - 1)  # what no key needs may be any number
    return cache[table].transpose(1, 2).flatten(2, 3)
