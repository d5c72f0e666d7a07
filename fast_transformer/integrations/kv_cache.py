"""The key-value caches of transformers, appended to in place.

`DynamicCache` makes a new tensor of all keys for every token. Here its layers' tensors become the
first rows of longer ones, which new keys are written into; to everybody else they are what they
were, tensors of as many keys as there are tokens. Whoever puts other tensors there (beam search
does, and cropping) is noticed, and they are copied once. `StaticCache` has room by itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from fast_transformer.nn.padding import readable
from fast_transformer.ops import attention_decode

LEAST_ROOM = 128  # keys
MOST_DECODED = 8  # query rows that attention_decode is made for


class Room(NamedTuple):
    """Tensors (batch, heads, capacity, head_dim), of which a layer's are the first keys.

    owner: the layer's id; a shallow copy of it must not write into the same memory.
    shown: the layer's tensors, as they were put there.
    """

    owner: int
    keys: Tensor
    values: Tensor
    shown: tuple[Tensor, Tensor]


def known(cache: Any) -> bool:
    """Tell whether `cache` is None or of a kind that this file can append to."""
    if cache is None:
        return True
    kind = {DynamicCache: DynamicLayer, StaticCache: StaticLayer}.get(type(cache))
    if kind is None or cache.offloading:
        return False
    if cache.layer_class_to_replicate not in (None, kind):
        return False
    return all(type(layer) is kind for layer in cache.layers)


def length(cache: Any, index: int = 0) -> int:
    """Tokens that layer `index` of `cache` holds."""
    return 0 if cache is None else int(cache.get_seq_length(index))


def append(cache: Any, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Put the keys of new tokens into layer `index`; returns that layer's keys and values.

    key, value: (batch, heads, tokens, head_dim); what is returned holds the tokens before too.
    """
    if torch.is_grad_enabled() or not readable(key) or type(cache) is not DynamicCache:
        before = length(cache, index) if type(cache) is StaticCache and readable(key) else None
        keys, values = cache.update(key, value, index)
        if before is None:
            return keys, values
        return keys[:, :, : before + key.shape[2]], values[:, :, : before + key.shape[2]]
    if not known(cache):
        return cache.update(key, value, index)  # type: ignore[no-any-return]
    layer = _layer(cache, index)
    if not layer.is_initialized:
        layer.lazy_initialization(key, value)
    before, tokens = layer.get_seq_length(), key.shape[2]
    keys, values = _with_room(layer, before, key, value)
    keys[:, :, before : before + tokens] = key
    values[:, :, before : before + tokens] = value
    return _show(layer, keys, values, before + tokens)


def decodes(cache: Any, before: int, query: Tensor) -> bool:
    """Tell whether `decode` can run: few rows behind some keys, and no gradient to record."""
    return (
        0 < before
        and query.shape[2] <= MOST_DECODED
        and not torch.is_grad_enabled()
        and readable(query)
        and known(cache)
    )


def decode(
    cache: Any, index: int, before: int, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Causal attention of new tokens (batch, heads, few, head_dim), whose keys go into the cache.

    Returns (batch, tokens, heads · head_dim).
    """
    layer = _layer(cache, index)
    static = type(cache) is StaticCache
    keys, values = (layer.keys, layer.values) if static else _with_room(layer, before, key, value)
    lengths = torch.full((query.shape[0],), before, dtype=torch.int32, device=query.device)
    out: Tensor = attention_decode(
        query, keys, values, lengths, new_key=key, new_value=value, scale=scale
    )
    if static:
        layer.cumulative_length.add_(query.shape[2])
    else:
        _show(layer, keys, values, before + query.shape[2])
    return out.transpose(1, 2).flatten(-2)


def _layer(cache: Any, index: int) -> Any:
    while len(cache.layers) <= index:  # as `update` does where a DynamicCache was made without them
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def _with_room(layer: Any, before: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors that hold the layer's keys and have room for those of `key`."""
    have: Room | None = layer.__dict__.get("_fast_transformer_room")
    wanted = before + key.shape[2]
    if (
        have is not None
        and have.owner == id(layer)
        and have.shown[0] is layer.keys
        and have.shown[1] is layer.values
        and have.keys.shape[2] >= wanted
        and (torch.is_inference_mode_enabled() or not have.keys.is_inference())
    ):
        return have.keys, have.values
    capacity = wanted + max(LEAST_ROOM, wanted // 2)
    made = []
    for new, old in ((key, layer.keys), (value, layer.values)):
        x = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
        if before:
            x[:, :, :before] = old
        made.append(x)
    return made[0], made[1]


def _show(layer: Any, keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    layer.keys, layer.values = keys[:, :, :count], values[:, :, :count]
    shown = layer.keys, layer.values
    layer._fast_transformer_room = Room(id(layer), keys, values, shown)
    return shown
