"""The BERT family of transformers: encoders that drop the padding, layers of fused steps.

What makes states of ids is in embeddings.py.

Five families share the code below to the letter but for the names of their classes. The
accelerated classes are made on first use, subclasses of the stock ones under the same names, and
found again by `fast_transformer.integrations.bert.<name>`, which is how pickle refers to them.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from fast_transformer.integrations import masks
from fast_transformer.integrations.calls import activation_of, asked, stock_call
from fast_transformer.integrations.embeddings import Embeddings
from fast_transformer.nn.packed_weights import packed_weight
from fast_transformer.nn.padding import Packing, readable
from fast_transformer.nn.plain import (
    any_hooked,
    is_linear,
    linear,
    perceptron,
    plain,
    residual_norm,
)
from fast_transformer.ops import attention, attention_varlen, linear_act, qkv_projection

PREFIXES = {  # transformers.models.<family>.modeling_<family> -> how its classes' names begin
    "bert": "Bert",
    "camembert": "Camembert",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
}


class Layer(nn.Module):
    """One layer: attention, residual step, MLP, residual step, on a batch or on packed tokens."""

    attention: Any
    intermediate: Any
    output: Any
    parts: dict[str, type[nn.Module]]  # the containers within a layer, as the family made them

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Return why this stock layer cannot be taken over, or None."""
        for name, expected in cls.parts.items():
            kind = type(module.get_submodule(name))
            if kind is not expected:
                return f"{name} is {kind.__name__}"
        if module.is_decoder or module.add_cross_attention:
            return "a decoder's layer"
        if module.chunk_size_feed_forward:
            return f"chunk_size_feed_forward is {module.chunk_size_feed_forward}"
        positions = getattr(module.attention.self, "position_embedding_type", "absolute")
        return None if positions == "absolute" else f"position_embedding_type is {positions!r}"

    def costs(self) -> Iterator[tuple[str, str]]:
        """(child, what its being special costs), for `explain`, beyond what any layer's would."""
        for name, expected in self.parts.items():
            kind = type(self.get_submodule(name))
            if kind is not expected:
                yield name, f"is {kind.__name__}: called as a module; its encoder computes padding"
        act = getattr(self.intermediate, "intermediate_act_fn", None)
        if activation_of(act) is None:
            name = type(act).__name__ if isinstance(act, nn.Module) else repr(act)
            yield "intermediate.intermediate_act_fn", f"{name} runs apart from the two products"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """(batch, length, C) → the same; or with a Packing as mask (tokens, C) → the same."""
        mask, containers = attention_mask, self.attention
        if not isinstance(mask, Packing) and (
            stock_call(args, kwargs)
            or not (mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 4)))
            or asked("output_attentions", containers.self.config, kwargs)
        ):
            return super().forward(hidden_states, mask, *args, **kwargs)  # type: ignore[no-any-return]
        part, x = self.parts, hidden_states
        if (
            plain(containers, part["attention"])
            and plain(containers.self, part["attention.self"])
            and plain(containers.output, part["attention.output"])
        ):
            out = containers.output
            attended = linear(out.dense, _attend(containers.self, x, mask))
            x = residual_norm(out.dropout, out.LayerNorm, attended, x)
        else:
            x = containers(x, mask, **kwargs)[0]
        inner, out = self.intermediate, self.output
        if plain(inner, part["intermediate"]) and plain(out, part["output"]):
            return residual_norm(out.dropout, out.LayerNorm, _mlp(inner, out.dense, x), x)
        return out(inner(x), x)  # type: ignore[no-any-return]


def _attend(module: Any, x: Tensor, mask: Tensor | Packing | None) -> Tensor:
    """Self-attention up to the heads' outputs side by side, of x's shape."""
    query, key, value = _projected(module, x)
    dropout_p = module.dropout.p if module.training else 0.0
    if isinstance(mask, Packing):
        out = attention_varlen(
            query, key, value, mask.cu_seqlens, mask.cu_seqlens, mask.max_seqlen, mask.max_seqlen,
            scale=module.scaling, dropout_p=dropout_p,
        )  # fmt: skip
    else:
        out = attention(
            query, key, value,
            bias=None if mask is None else masks.as_bias(mask, query),
            scale=module.scaling, dropout_p=dropout_p,
        ).transpose(1, 2)  # fmt: skip
    return out.flatten(-2)


def _projected(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """(batch, length, C) → (batch, heads, length, head_dim) thrice; (tokens, C) → (tokens, …)."""
    heads, layers = module.num_attention_heads, (module.query, module.key, module.value)
    if all(is_linear(layer) and packed_weight(layer, x) is None for layer in layers):
        weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        return qkv_projection(x, weights, biases, heads=heads)
    parts = (linear(f, x).view(*x.shape[:-1], heads, module.attention_head_size) for f in layers)
    return tuple(part.transpose(1, 2) if x.dim() == 3 else part for part in parts)


def _mlp(inner: Any, outer: Any, x: Tensor) -> Tensor:
    """The two products with the activation between them."""
    name = activation_of(inner.intermediate_act_fn)
    if name is not None and is_linear(inner.dense) and is_linear(outer):
        return perceptron(inner.dense, outer, name, x)
    if name is not None and is_linear(inner.dense):
        hidden = linear_act(x, inner.dense.weight, inner.dense.bias, activation=name)
    else:
        hidden = inner.intermediate_act_fn(linear(inner.dense, x))
    return linear(outer, hidden)


class Encoder(nn.Module):
    """The stack: padding is dropped before the first layer and put back, as zeros, at the end."""

    config: Any
    layer: nn.ModuleList
    layer_class: type[nn.Module]  # the stock one

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Return why this stock encoder cannot be taken over, or None."""
        if module.config.is_decoder or module.config.add_cross_attention:
            return "a decoder's stack"
        for i, layer in enumerate(module.layer):
            if not isinstance(layer, Layer) and type(layer) is not cls.layer_class:
                return f"layer.{i} is {type(layer).__name__}"
            target: Any = accelerated(cls.layer_class)
            reason = None if isinstance(layer, Layer) else target.unsupported(layer)
            if reason is not None:
                return f"layer.{i}: {reason}"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """(batch, length, C) → the same within a BaseModelOutputWithPastAndCrossAttentions.

        attention_mask: what transformers makes of the user's; see `masks.padding`.
        """
        mask = attention_mask
        stock: Callable[..., Any] = partial(super().forward, hidden_states)
        if stock_call(args, kwargs) or not (mask is None or isinstance(mask, Tensor)):
            return stock(mask, *args, **kwargs)
        batch, length = hidden_states.shape[:2]
        keep = None if mask is None else masks.padding(mask, batch, length)
        if keep is None:
            return stock(mask, *args, **kwargs)
        if readable(keep):
            packing = Packing(keep)
            if packing.tokens.numel() == batch * length:
                return stock(None, *args, **kwargs)
            if self._packs(kwargs):
                return self._packed(hidden_states, packing)
        output = stock(mask, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.masked_fill(~keep[..., None], 0)
        return output

    def _packs(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether nobody sees what goes from layer to layer, so that it may be packed."""
        if any(
            asked(name, self.config, kwargs)
            for name in ("output_hidden_states", "output_attentions")
        ):
            return False
        return all(
            isinstance(layer, Layer)
            and all(type(layer.get_submodule(n)) is kind for n, kind in layer.parts.items())
            and not any_hooked(layer)
            for layer in self.layer
        )

    def _packed(self, hidden_states: Tensor, packing: Packing) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        x = packing.pack(hidden_states)
        for layer in self.layer:
            x = layer(x, packing)  # called, so that gradient checkpointing acts
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=packing.unpack(x))


def accelerated(stock: type) -> type | None:
    """Return the accelerated subclass of a stock class of the family, or None."""
    family = stock.__module__.rpartition(".modeling_")[2]
    if stock.__module__ != f"transformers.models.{family}.modeling_{family}":
        return None
    prefix = PREFIXES.get(family)
    if prefix is None or stock.__name__ not in _names(prefix):
        return None
    made: type = getattr(sys.modules[__name__], stock.__name__)
    return made if issubclass(made, stock) else None


def _names(prefix: str) -> tuple[str, ...]:
    return tuple(prefix + suffix for suffix in ("Embeddings", "Encoder", "Layer"))


def __getattr__(name: str) -> type:
    """Make the accelerated class `name` on first use; its stock module is imported for that."""
    from importlib import import_module

    for family, prefix in PREFIXES.items():
        if name in _names(prefix):
            module = import_module(f"transformers.models.{family}.modeling_{family}")
            stock = getattr(module, name)
            fields: dict[str, Any] = {"__module__": __name__, "__doc__": stock.__doc__}
            base: type[nn.Module] = Embeddings
            if name.endswith("Layer"):
                base = Layer
                fields["parts"] = {
                    part: getattr(module, prefix + suffix)
                    for part, suffix in (
                        ("attention", "Attention"),
                        ("attention.self", "SelfAttention"),
                        ("attention.output", "SelfOutput"),
                        ("intermediate", "Intermediate"),
                        ("output", "Output"),
                    )
                }
            elif name.endswith("Encoder"):
                base = Encoder
                fields["layer_class"] = getattr(module, f"{prefix}Layer")
            return globals().setdefault(name, type(name, (base, stock), fields))  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
