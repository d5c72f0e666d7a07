"""What `accelerate(inference=True)` prepares: packed weights beside the parameters; `repack`."""

from typing import Literal

from torch import nn

from fast_transformer.integrations import registry
from fast_transformer.nn import GatedMLP, LinearCrossEntropy, MultiheadAttention
from fast_transformer.nn.packed_weights import PackedParameter, packed_parameters
from fast_transformer.nn.plain import is_linear, plain

Inference = bool | Literal["int8"]
UNREAD = (GatedMLP, LinearCrossEntropy)  # whose ops read the parameters of their layers


def check(inference: Inference) -> None:
    """Raise unless `inference` is one of the three."""
    if not isinstance(inference, bool) and inference != "int8":
        raise ValueError(
            f"accelerate: inference is {inference!r}; accepted are False, True and 'int8'."
        )


def prepare(model: nn.Module, inference: Inference) -> None:
    """Let every linear layer that a module of ours runs keep its weight packed, or none."""
    forget(model)
    if inference is False:
        return
    unread = {id(m) for each in model.modules() if isinstance(each, UNREAD) for m in each.modules()}
    for ours in model.modules():
        if not registry.ours(ours):
            continue
        for layer in ours.modules():
            name = None if id(layer) in unread else _parameter(layer)
            if name is not None and "_packed_parameter" not in layer.__dict__:
                kept = PackedParameter(name, inference == "int8")
                layer.__dict__["_packed_parameter"] = kept
                kept.renew(layer)


def _parameter(module: nn.Module) -> str | None:
    """Return the name of the weight that fused steps read from `module`, if they read one."""
    if is_linear(module):
        return "weight"
    if plain(module, nn.MultiheadAttention, MultiheadAttention):
        return "in_proj_weight" if module.in_proj_weight is not None else None
    return None


def forget(model: nn.Module) -> None:
    """Drop all packed weights."""
    for _, layer, _ in list(packed_parameters(model)):
        del layer.__dict__["_packed_parameter"]


def repack(model: nn.Module) -> nn.Module:
    """Pack the weights of `model` anew, after an edit that left no trace in their version counters.

    That is one through `.data`, or from outside of torch. Others are noticed at the next call.

    Returns:
        `model` itself. Without `accelerate(model, inference=True)` nothing happens.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"repack: model must be a torch.nn.Module, got {type(model).__name__}.")
    for _, layer, kept in packed_parameters(model):
        kept.renew(layer)
    return model
