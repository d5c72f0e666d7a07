"""The one table of what is swapped for what, and the mark that a swapped module carries."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

Shapes = tuple[tuple[int, ...], ...]
Sample = Shapes | tuple[Tensor, ...]


class Entry(NamedTuple):
    """What takes a stock class's place.

    target: its subclass, whose `unsupported(module)` answers why an instance must stay, or None.
    children: when they are swapped too. A stack's always are; those of a layer that stays never,
        since torch.nn's fast path would bypass them; some layers have no use for it.
    sample: the inputs that a self-check runs a module on, or shapes of random ones; None for
        stacks.
    """

    target: Any
    children: Literal["always", "with it", "never"]
    sample: Callable[[Any], Sample] | None


def entry(stock: type) -> Entry | None:
    """Return what takes the place of exactly this class, or None."""
    if stock.__module__.startswith("torch.nn."):
        return _torch().get(stock)
    if stock.__module__.startswith("transformers.models."):  # only then is it worth an import
        if stock.__module__ == "transformers.models.gpt2.modeling_gpt2":
            return _gpt2(stock)
        from fast_transformer.integrations import bert, embeddings, rms

        if (norm := rms.accelerated(stock)) is not None:
            return Entry(norm, "never", lambda m: ((2, 5, *m.weight.shape),))
        target = bert.accelerated(stock)
        if target is not None:
            if issubclass(target, bert.Encoder):
                return Entry(target, "always", None)
            if issubclass(target, embeddings.Embeddings):
                return Entry(target, "always", embeddings.sample)
            return Entry(target, "never", lambda m: _batches(m.attention.self.config.hidden_size))
    return None


def _gpt2(stock: type) -> Entry | None:
    from fast_transformer.integrations import gpt2

    target = gpt2.accelerated(stock)
    if target is None:
        return None
    if target is not gpt2.GPT2Block:
        return Entry(target, "always", None)
    return Entry(target, "never", lambda m: _batches(m.attn.embed_dim))


@cache
def _torch() -> dict[type, Entry]:
    from fast_transformer import nn as ours

    return {
        nn.LayerNorm: Entry(ours.LayerNorm, "never", lambda m: ((2, *m.normalized_shape),)),
        nn.RMSNorm: Entry(ours.RMSNorm, "never", lambda m: ((2, *m.normalized_shape),)),
        nn.MultiheadAttention: Entry(
            ours.MultiheadAttention, "never", lambda m: _batches(m.embed_dim, m.kdim, m.vdim)
        ),
        nn.TransformerEncoderLayer: Entry(
            ours.TransformerEncoderLayer, "with it", lambda m: _batches(m.self_attn.embed_dim)
        ),
        nn.TransformerEncoder: Entry(ours.TransformerEncoder, "always", None),
    }


def _batches(*widths: int) -> Shapes:
    return tuple((2, 5, width) for width in widths)


def ours(module: nn.Module) -> bool:
    """Tell whether `module` is of our own classes, swapped or built so."""
    return "_stock_class" in module.__dict__ or type(module).__module__.startswith(
        ("fast_transformer.nn", "fast_transformer.integrations")
    )


def relative(stock: type) -> type | None:
    """Return the class of the table that `stock` is a subclass of, or None."""
    return next((base for base in stock.__mro__[1:] if entry(base) is not None), None)


def swap(module: nn.Module, target: type) -> None:
    """Make `module` an instance of `target`, marked with the class that it had."""
    module.__dict__["_stock_class"] = type(module)
    module.__class__ = cast(type[nn.Module], target)


def swapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what carries the mark."""
    for name, module in model.named_modules():
        if "_stock_class" in module.__dict__:
            yield name, module


def unswap(module: nn.Module) -> None:
    """Give `module` back the class that it had."""
    module.__class__ = module.__dict__.pop("_stock_class")
