"""`accelerate` and `restore`: modules change their class, and nothing else about them changes."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from fast_transformer.integrations import prepared, registry, selfcheck


class Candidate(NamedTuple):
    """A module that the table knows: `entry` is what takes its place unless `reason` forbids."""

    name: str
    module: nn.Module
    entry: registry.Entry | None
    reason: str | None


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every stock module that could be swapped or nearly so, parents first."""
    yield from _below("", model, set())


def _below(name: str, module: nn.Module, seen: set[int]) -> Iterator[Candidate]:
    if id(module) in seen:
        return
    seen.add(id(module))
    kind = module.__dict__.get("_stock_class", type(module))
    entry, reason = registry.entry(kind), None
    if not registry.ours(module):
        near = None if entry is not None else registry.relative(kind)
        if near is not None:
            reason = f"a subclass of {near.__name__}, whose forward may be another"
            yield Candidate(name, module, None, reason)
            entry = registry.entry(near)
        elif entry is not None:
            reason = entry.target.unsupported(module) or selfcheck.verdict(module, entry)
            yield Candidate(name, module, entry, reason)
    if entry is not None and entry.children != "always":
        if entry.children == "never" or reason is not None:
            return
    for key, child in module.named_children():
        yield from _below(f"{name}.{key}" if name else key, child, seen)


def accelerate(
    model: nn.Module, *, inference: prepared.Inference = False, strict: bool = False
) -> nn.Module:
    """Swap fused modules into `model`, in place; `restore` undoes it, `explain` tells what it did.

    Layers and stacks of torch.nn's Transformer encoder, of the BERT family and of GPT-2 of
    transformers, and norms of both, become subclasses of what they were. Parameters, their names,
    hooks and the state_dict stay the same objects and keys. What cannot be taken over stays as it
    was.

    Args:
        model: any module; it may be accelerated already, or lie on the meta device.
        inference: keep the weights of linear layers packed too, beside the parameters, for calls in
            eval mode without a gradient. True: the same numbers. "int8": rounded to 8 bits with a
            scale for each output; `explain` tells the largest error. A changed parameter is
            packed anew when it is used next, but see `repack`.
        strict: raise where a module that could be swapped in principle has to stay, before
            anything is changed.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no module. ValueError: an unknown `inference`. RuntimeError: strict,
        naming the modules and reasons.
    """
    prepared.check(inference)
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}.")
    found = list(candidates(model))
    staying = [c for c in found if c.reason is not None]
    if strict and staying:
        listed = "; ".join(f"{c.name or 'the model'}: {c.reason}" for c in staying)
        raise RuntimeError(f"accelerate: not every module can be taken over ({listed}).")
    for candidate in found:
        if candidate.reason is None and candidate.entry is not None:
            registry.swap(candidate.module, candidate.entry.target)
        elif isinstance(candidate.module, nn.TransformerEncoder):
            _refuse_nested(candidate.module)
    if not any(registry.ours(module) for module in model.modules()):
        nothing = "nothing to accelerate: " + (
            "; ".join(f"{c.name or 'the model'}: {c.reason}" for c in staying)
            or f"{type(model).__name__} has no module of torch.nn's Transformer encoder or of "
            "transformers' BERT family or GPT-2"
        )
        if strict:
            raise RuntimeError(f"accelerate: {nothing}.")
        warnings.warn(nothing, stacklevel=2)
    prepared.prepare(model, inference)
    return model


def _refuse_nested(encoder: nn.TransformerEncoder) -> None:
    """Keep a stock encoder from handing nested tensors to the layers that are swapped in it."""
    if getattr(encoder, "use_nested_tensor", False):
        encoder.__dict__["_stock_use_nested_tensor"] = encoder.use_nested_tensor
        encoder.use_nested_tensor = False


def restore(model: nn.Module) -> nn.Module:
    """Give every module of `model` that `accelerate` swapped its class back, in place.

    Returns:
        `model` itself. A model that was not accelerated stays as it is.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}.")
    prepared.forget(model)
    for _, module in list(registry.swapped(model)):
        registry.unswap(module)
    for module in model.modules():
        if "_stock_use_nested_tensor" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("_stock_use_nested_tensor")
    return model
