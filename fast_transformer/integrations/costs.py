"""What keeps a swapped layer from fusing all that it could."""

from collections.abc import Iterator

from torch import nn

from fast_transformer.integrations.embeddings import Embeddings
from fast_transformer.nn import TransformerEncoderLayer
from fast_transformer.nn.plain import hooked, is_linear

_LINEAR = ("query", "key", "value", "dense", "out_proj", "linear1", "linear2")


def costs(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """(child, what it costs) for a layer of ours; nothing for other modules."""
    if isinstance(layer, Embeddings):
        yield from layer.costs()
        return
    own = getattr(layer, "costs", None)
    if own is None and not isinstance(layer, TransformerEncoderLayer):
        return
    for name, child in layer.named_modules():
        kind = type(child).__name__
        if hooked(child):
            what = "a forward of its own" if "forward" in child.__dict__ else "hooks"
            cost = getattr(layer, "hook_cost", "called as a module; its encoder computes padding")
            yield name, f"{kind} has {what}: {cost}"
        elif name.rpartition(".")[2] in _LINEAR and not is_linear(child):
            yield name, f"is {kind}: called as a module"
    if own is not None:
        yield from own()
