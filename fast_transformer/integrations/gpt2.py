"""GPT-2 of transformers: blocks of fused steps, padding as two numbers a sequence, caches in place.

The residual stream goes from norm to norm: what a sublayer computed is dropped out, added and
normalised in one pass, across the border between two blocks too. Conv1D's weights are (in, out);
the ops take them as they lie.
"""

import inspect
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D
from transformers.utils import output_capturing

from fast_transformer import ops
from fast_transformer.integrations import kv_cache, masks
from fast_transformer.integrations.calls import activation_of, asked, stock_call
from fast_transformer.integrations.masks import Keys
from fast_transformer.nn import plain
from fast_transformer.nn.padding import readable

MOST_HEAD_ROWS = 16


def project(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, (..., K) → (..., N), fused when it is a plain Conv1D or linear layer."""
    if plain.plain(module, Conv1D):
        return ops.linear_act(x, module.weight.t(), module.bias)  # type: ignore[operator, arg-type]
    return plain.linear(module, x)


def _added(dropout: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """`residual + dropout(x)`, a norm's fused pass without the norm where there is dropout."""
    if not (dropout.training and plain.plain(dropout, nn.Dropout)):
        dropped: Tensor = dropout(x)
        return dropped if residual is None else residual + dropped
    residual = torch.zeros_like(x) if residual is None else residual
    return ops.add_norm(x, residual, dropout_p=dropout.p, return_sum=True)[1]  # type: ignore[arg-type]


def _weights_wanted() -> bool:
    """Tell whether transformers collects the weights of attention from the call that runs."""
    collected = output_capturing._active_collector.get()
    return collected is not None and bool({"attentions", "cross_attentions"} & set(collected))


class GPT2Block(stock.GPT2Block):  # type: ignore[misc]
    """One block: norm, attention, residual step with norm, MLP; a residual step closes it."""

    hook_cost = "called as a module"

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Return why this stock block cannot be taken over, or None."""
        if "cache" not in inspect.signature(stock.GPT2Block.forward).parameters:
            return "this version of transformers has another GPT2Block"
        for name, kind in (("attn", stock.GPT2Attention), ("mlp", stock.GPT2MLP)):
            if type(getattr(module, name)) is not kind:
                return f"{name} is {type(getattr(module, name)).__name__}"
        if hasattr(module, "crossattention"):
            return "a layer with cross-attention"
        return None

    def costs(self) -> Iterator[tuple[str, str]]:
        """(child, what its being special costs), for `explain`."""
        for name, kind in (("attn", stock.GPT2Attention), ("mlp", stock.GPT2MLP)):
            child = getattr(self, name)
            if type(child) is not kind:
                yield name, f"is {type(child).__name__}: the stock block runs"
                continue
            for part in ("c_attn", "c_proj") if name == "attn" else ("c_fc", "c_proj"):
                if type(getattr(child, part)) not in (Conv1D, nn.Linear):
                    what = type(getattr(child, part)).__name__
                    yield f"{name}.{part}", f"is {what}: called as a module"
        act = getattr(self.mlp, "act", None)
        if activation_of(act) is None:
            yield "mlp.act", f"{type(act).__name__} runs apart from the two products"

    def whole(self) -> bool:
        """Whether attention and MLP are what they were, with nobody watching them as a whole."""
        return plain.plain(self.attn, stock.GPT2Attention) and plain.plain(self.mlp, stock.GPT2MLP)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | Keys | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """(batch, length, C) → the same. attention_mask: Keys, or what the stock model makes."""
        mask = attention_mask
        if not isinstance(mask, Keys):
            if (
                stock_call(args, {k: v for k, v in kwargs.items() if k != "is_causal"})
                or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4))
                or not self.whole()
                or _weights_wanted()
            ):
                return super().forward(hidden_states, cache, mask, *args, **kwargs)  # type: ignore[no-any-return]
            if mask is None and self.attn.config._attn_implementation != "eager":
                causal = kwargs.get("is_causal")
                mask = Keys() if (self.attn.is_causal if causal is None else causal) else None
        normed = plain.norm(self.ln_1, hidden_states)
        out, residual = self.sublayers(normed, hidden_states, mask, cache)
        return _added(self.mlp.dropout, out, residual)

    def sublayers(
        self, normed: Tensor, residual: Tensor, mask: Keys | Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """What the MLP computed, before its dropout, and the residual that it is to be added to."""
        attn, inner = self.attn, self.mlp
        out = project(attn.c_proj, self._attend(normed, mask, cache))
        normed, residual = plain.residual_norm_and_sum(attn.resid_dropout, self.ln_2, out, residual)
        name, first, second = activation_of(inner.act), inner.c_fc, inner.c_proj
        if name is not None and plain.plain(first, Conv1D) and plain.plain(second, Conv1D):
            out = ops.mlp(
                normed, first.weight.t(), first.bias, second.weight.t(), second.bias,
                activation=name,
            )  # fmt: skip
        else:
            out = project(second, inner.act(project(first, normed)))
        return out, residual

    def _attend(self, x: Tensor, mask: Keys | Tensor | None, cache: Any) -> Tensor:
        """Self-attention up to the heads' outputs side by side, of x's shape.

        mask: the keys that rows see besides being causal; a bias that says all; None for all keys.
        """
        attn, index = self.attn, self.attn.layer_idx
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, attn.num_heads, attn.head_dim).transpose(1, 2)
            for part in torch.split(project(attn.c_attn, x), C, dim=2)
        )
        keys = mask if isinstance(mask, Keys) else None
        if cache is not None:
            before = kv_cache.length(cache, index)
            if keys is not None and keys.all and kv_cache.decodes(cache, before, query):
                return kv_cache.decode(cache, index, before, query, key, value, attn.scaling)
            appended = kv_cache.append(cache, index, key, value)
            if before != 0 or keys is None:
                key, value = appended
        if keys is None:
            bias = None if mask is None else masks.as_bias(mask, query)  # type: ignore[arg-type]
        else:
            bias = keys.bias
        out = ops.attention(
            query, key, value, bias=bias, causal=keys is not None,
            key_starts=keys and keys.starts, key_lengths=keys and keys.lengths,
            scale=attn.scaling, dropout_p=attn.attn_dropout.p if attn.training else 0.0,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(-2)


class GPT2Model(stock.GPT2Model):  # type: ignore[misc]
    """Embeddings, blocks, norm. Padding is told to attention by where the tokens begin and end."""

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Return why this stock model cannot be taken over, or None."""
        for i, block in enumerate(module.h):
            if not isinstance(block, GPT2Block) and type(block) is not stock.GPT2Block:
                return f"h.{i} is {type(block).__name__}"
            reason = None if isinstance(block, GPT2Block) else GPT2Block.unsupported(block)
            if reason is not None:
                return f"h.{i}: {reason}"
        return None

    @wraps(stock.GPT2Model.forward)
    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock model's, which runs where a call asks for more than this one does."""
        fused = None if args else self._fused(input_ids, **kwargs)
        return super().forward(input_ids, *args, **kwargs) if fused is None else fused

    def _fused(
        self,
        input_ids: Tensor | None,
        cache: Any = None,
        attention_mask: Any = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the blocks from norm to norm; None where the stock model has to."""
        config, given = self.config, input_ids if inputs_embeds is None else inputs_embeds
        if (
            not isinstance(given, Tensor)
            or (input_ids is None) == (inputs_embeds is None)
            or stock_call((), kwargs)
            or not getattr(config, "return_dict", True)
            or not getattr(config, "is_causal", True)
            or any(
                asked(f"output_{name}", config, kwargs) for name in ("hidden_states", "attentions")
            )
            or not kv_cache.known(cache)
            or (cache is not None and not readable(given))
            # without a mask these may tell of several sequences in one row
            or (position_ids is not None and attention_mask is None and cache is None)
            or any(not plain.plain(block, GPT2Block) or not block.whole() for block in self.h)
        ):
            return None
        checkpoints = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if use_cache is None:
            use_cache = config.use_cache
        if checkpoints:
            use_cache, cache = False, None
        if use_cache and cache is None:
            if not readable(given):
                return None
            cache = DynamicCache(config=config)
        shape = given.shape if inputs_embeds is None else given.shape[:-1]
        before = kv_cache.length(cache)
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() > 3:
                return None
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(given.view(-1, shape[-1]))
        B, T, C = inputs_embeds.shape
        if attention_mask is not None:
            if attention_mask.numel() != B * (before + T):
                return None
            attention_mask = attention_mask.reshape(B, before + T)
        keys = Keys.of(attention_mask)
        if position_ids is None:
            position_ids = torch.arange(before, before + T, device=inputs_embeds.device)[None]
        x = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids.view(-1, shape[-1]))
        x = self._blocks(x, keys, cache, checkpoints)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x.view(-1, *shape[1:], C), cache=cache if use_cache else None
        )

    def _blocks(self, x: Tensor, keys: Keys, cache: Any, checkpoints: bool) -> Tensor:
        """The embeddings' dropout, all blocks and the last norm."""
        blocks: Any = self.h
        if checkpoints or not len(blocks):
            x = _added(self.drop, x, None)
            for block in blocks:
                x = block(x, None, keys)  # called, so that gradient checkpointing acts
            return plain.norm(self.ln_f, x)
        first = blocks[0].ln_1
        if self.drop.training:
            normed, x = plain.residual_norm_and_sum(self.drop, first, x, torch.zeros_like(x))
        else:
            x = self.drop(x)
            normed = plain.norm(first, x)
        for block, following in zip(blocks, [*(b.ln_1 for b in blocks[1:]), None], strict=True):
            out, x = block.sublayers(normed, x, keys, cache)
            if following is None:
                return plain.residual_norm(block.mlp.dropout, self.ln_f, out, x)
            normed, x = plain.residual_norm_and_sum(block.mlp.dropout, following, out, x)
        raise AssertionError("there is a last block")


class GPT2LMHeadModel(stock.GPT2LMHeadModel):  # type: ignore[misc]
    """The language model; its head on the fused op for the few tokens of a step of generation."""

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Return why this stock model cannot be taken over, or None."""
        return None

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Leave a mask of two dimensions as it is, which `GPT2Model` asks for."""
        mask = kwargs.get("attention_mask")
        if isinstance(self.transformer, GPT2Model) and not torch.compiler.is_compiling():
            return mask
        from transformers.masking_utils import create_masks_for_generate

        return create_masks_for_generate(*args, **kwargs)

    @wraps(stock.GPT2LMHeadModel.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the stock model's, with a fused head."""
        returns = kwargs.get("return_dict", getattr(self.config, "return_dict", True))
        if args or not returns or not plain.is_linear(self.lm_head):
            return super().forward(
                input_ids, *args, labels=labels, logits_to_keep=logits_to_keep, **kwargs
            )
        outputs = self.transformer(input_ids, **kwargs)
        hidden = stock.slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        # for many rows the stock product is as fast or faster: it is large, and nothing else
        few = hidden.numel() <= MOST_HEAD_ROWS * hidden.shape[-1]
        logits = plain.linear(self.lm_head, hidden) if few else self.lm_head(hidden)
        loss = None
        if labels is not None:
            own = {k: v for k, v in kwargs.items() if k not in _OF_THE_MODEL}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **own)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


_OF_THE_MODEL = frozenset(inspect.signature(stock.GPT2Model.forward).parameters)
_TARGETS = {
    stock.GPT2Block: GPT2Block,
    stock.GPT2Model: GPT2Model,
    stock.GPT2LMHeadModel: GPT2LMHeadModel,
}
for _class in (GPT2Model, GPT2LMHeadModel):  # where the recorder of outputs looks for them, by name
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(_class), _class._can_record_outputs)


def accelerated(kind: type) -> type | None:
    """Return the accelerated subclass of exactly this stock class, or None."""
    return _TARGETS.get(kind)
