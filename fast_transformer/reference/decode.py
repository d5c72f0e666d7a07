"""Attention of a few query rows on a cache of keys and values, as the formula reads."""

import torch

from fast_transformer.reference.attention import attend, heads_and_keys, widened


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
    T, head_dim = query.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    keys = cache_lengths.long()
    if new_key is not None:
        position = keys[:, None] + torch.arange(new_key.shape[2], device=query.device)
        block, row = _place(position, key_cache.shape[2], block_table)
        key_cache[block, :, row] = new_key.transpose(1, 2)
        value_cache[block, :, row] = new_value.transpose(1, 2)
        keys = keys + new_key.shape[2]

    key, value = _sequences(key_cache, block_table), _sequences(value_cache, block_table)
    key, value, exists = heads_and_keys(query, key, value, None, keys)
    return attend(
        widened(query @ key.mT) * scale, value, exists, causal=causal,
        causal_offset=(keys - T).view(-1, 1, 1, 1), window=window, alibi_slopes=alibi_slopes,
        softcap=softcap,
    )  # fmt: skip


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
