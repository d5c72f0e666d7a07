"""torch.nn.MultiheadAttention on the fused ops."""

import torch
from torch import Tensor, nn

from fast_transformer import ops
from fast_transformer.nn.masks import Masks, from_torch
from fast_transformer.nn.packed_weights import packed_weight
from fast_transformer.nn.padding import Packing
from fast_transformer.nn.plain import linear
from fast_transformer.ops.packed import packed_linear
from fast_transformer.reference.philox import keep_mask, keep_scale

_NAME = "MultiheadAttention"


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same arguments, parameters, masks and results.

    It differs in two things: a row whose keys are all masked gives zeros where torch gives NaN, and
    dropout draws from a generator of its own. Nested tensors are left to torch.nn's own forward.
    """

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Answer why `module`, a torch.nn.MultiheadAttention, must stay one; None if not."""
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (T, batch, embed_dim), with batch_first (batch, T, embed_dim), or (T, embed_dim).
            key: the same with S and kdim.
            value: the same with S and vdim.
            key_padding_mask: (batch, S), or (S,) for one sequence: bool, where True forbids, or
                added to the scores.
            need_weights: return the weights too; they are formed in a second pass, and cost memory
                for (T, S) of them.
            attn_mask: (T, S) or (batch · heads, T, S), bool or added.
            average_attn_weights: average the weights over the heads.
            is_causal: a hint that attn_mask is the causal mask, which then is not read.

        Returns:
            The output, shaped like `query`, and the weights (batch, T, S), or (batch, heads, T, S)
            where not averaged, or None.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        _check(self, query, key, value)
        alone, same_kv, same = query.dim() == 2, key is value, query is key is value
        if alone:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        B, T, S = query.shape[0], query.shape[1], key.shape[1]
        extra = (self.bias_k is not None) + self.add_zero_attn
        if is_causal and extra:
            is_causal = attn_mask is None  # the hint cannot speak of keys that are added
        masks = from_torch(
            _NAME, attn_mask, key_padding_mask, is_causal, (B, self.num_heads, T, S)
        ).extended(extra)

        q, k, v = _projected(self, query, key, value, same, same_kv)
        out, weights = _attend(self, q, k, v, masks, need_weights)
        out = linear(self.out_proj, out)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if alone:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights


def packable(module: nn.MultiheadAttention) -> bool:
    """Tell whether `self_attention_packed` serves this module."""
    return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn


def self_attention_packed(
    module: nn.MultiheadAttention, x: Tensor, packing: Packing, causal: bool
) -> Tensor:
    """Self-attention within packed sequences, (tokens, embed_dim) → (tokens, embed_dim)."""
    query, key, value = _self_projected(module, x)
    out: Tensor = ops.attention_varlen(
        query, key, value, packing.cu_seqlens, packing.cu_seqlens,
        packing.max_seqlen, packing.max_seqlen, causal=causal,
        causal_offset=0 if causal else None, dropout_p=_dropout(module),
    )  # fmt: skip
    return linear(module.out_proj, out.reshape(x.shape))


def _self_projected(module: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, ...]:
    """(batch, length, C) → (batch, heads, length, D) thrice; (tokens, C) → (tokens, heads, D)."""
    weight = packed_weight(module, x)
    if weight is None:
        made: tuple[Tensor, ...] = ops.qkv_projection(
            x, module.in_proj_weight, module.in_proj_bias, heads=module.num_heads
        )
        return made
    joined = packed_linear(x, weight, module.in_proj_bias)
    parts = joined.view(*x.shape[:-1], 3, module.num_heads, module.head_dim).unbind(-3)
    return parts if x.dim() == 2 else tuple(part.transpose(1, 2) for part in parts)


def _dropout(module: nn.MultiheadAttention) -> float:
    return module.dropout if module.training else 0.0


def _check(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x, width in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
            layout = "batch, length" if module.batch_first else "length, batch"
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(x.shape)}; it must be ({layout}, {width}), or "
                f"(length, {width}) for one sequence, as the others."
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"{_NAME}: value has shape {tuple(value.shape)} but key has {tuple(key.shape)}; their "
            "lengths and batches must match."
        )
    batch = 0 if module.batch_first else 1
    if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
        raise ValueError(
            f"{_NAME}: key has batch {key.shape[batch]} but query has {query.shape[batch]}; they "
            "must match."
        )


def _projected(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    same: bool,
    same_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, ·) thrice → (batch, heads, length, head_dim) thrice, keys added behind."""
    bias = module.in_proj_bias
    if module._qkv_same_embed_dim:
        weight, E = module.in_proj_weight, module.embed_dim
        if same:
            return _extended(module, *_self_projected(module, query))
        if same_kv:
            w_q, w_kv = weight[:E], weight[E:]
            b_q, b_kv = (None, None) if bias is None else (bias[:E], bias[E:])
            q = ops.linear_act(query, w_q, b_q)
            k, v = ops.linear_act(key, w_kv, b_kv).chunk(2, -1)
        else:
            q, k, v = _each(query, key, value, weight.chunk(3), bias)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        q, k, v = _each(query, key, value, weights, bias)
    heads = (module.num_heads, module.head_dim)
    q, k, v = (x.view(*x.shape[:2], *heads).transpose(1, 2) for x in (q, k, v))
    return _extended(module, q, k, v)


def _extended(
    module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, heads, length, head_dim) thrice, with the keys that the module adds behind."""
    one = (k.shape[0], module.num_heads, 1, module.head_dim)
    if module.bias_k is not None and module.bias_v is not None:
        by_heads = (1, module.num_heads, 1, module.head_dim)
        k = torch.cat([k, module.bias_k.to(k.dtype).view(by_heads).expand(one)], 2)
        v = torch.cat([v, module.bias_v.to(v.dtype).view(by_heads).expand(one)], 2)
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(one)], 2) for x in (k, v))
    return q, k, v


def _each(
    query: Tensor, key: Tensor, value: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (
        ops.linear_act(x, weight, b)
        for x, weight, b in zip((query, key, value), weights, biases, strict=True)
    )
    return q, k, v


def _attend(
    module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, masks: Masks, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """(batch, T, embed_dim) and, where asked for, the weights (batch, heads, T, S)."""
    (B, H, T, _), S, dropout_p = q.shape, k.shape[2], _dropout(module)
    options = masks.options(q.dtype)
    if not need_weights:
        out = ops.attention(q, k, v, dropout_p=dropout_p, **options)
        return out.transpose(1, 2).flatten(2), None
    seed = None
    if dropout_p > 0.0:  # the weights are those that made the output
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=q.device)
    out, lse = ops.attention(
        q, k, v, dropout_p=dropout_p, seed=seed, return_lse=True, **options
    )  # fmt: skip
    scores = (q @ k.mT).to(lse.dtype) * module.head_dim**-0.5 + masks.added(T, S, q)
    # not exp(scores - lse): both are rounded, and what cancels leaves their errors in the weights
    if masks.attention is None and masks.padding is None:
        weights = scores.softmax(-1)
    else:
        empty = (lse == -torch.inf)[..., None]
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    if seed is not None:
        keep = keep_mask(seed, dropout_p, B, H, T, S)
        weights = weights.masked_fill(~keep, 0.0) * keep_scale(dropout_p)
    return out.transpose(1, 2).flatten(2), weights.to(q.dtype)
