"""What a call of a transformers module asks for, and which of its activations we know."""

from typing import Any

from torch import nn

from fast_transformer.nn.plain import hooked

ACTIVATIONS = {  # of transformers.activations and torch.nn -> our name of it
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
}
# What a model hands down that no layer computes with. With any other argument the call is stock.
HARMLESS = frozenset(
    ("position_ids", "output_hidden_states", "output_attentions", "use_cache", "return_dict",
     "num_items_in_batch")
)  # fmt: skip


def stock_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call asks for what only the stock forward does: a cache, cross-attention."""
    return any(value is not None for value in args) or any(
        value is not None and value is not False
        for name, value in kwargs.items()
        if name not in HARMLESS
    )


def asked(name: str, config: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether `name` (output_attentions, output_hidden_states) is wanted from this call."""
    wanted = kwargs.get(name)
    wanted = getattr(config, name, False) if wanted is None else wanted
    return wanted is not None and wanted is not False


def activation_of(module: object) -> str | None:
    """Return our name of an activation that a fused step can take in, or None."""
    if not isinstance(module, nn.Module):
        return {nn.functional.gelu: "gelu", nn.functional.relu: "relu"}.get(module)  # type: ignore[call-overload, no-any-return]
    known = type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return ACTIVATIONS.get(type(module).__name__) if known and not hooked(module) else None
