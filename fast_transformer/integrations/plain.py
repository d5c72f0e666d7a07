"""Which children a fused step may see through: the one rule for hooks, adapters and wrappers.

A fused step reads a child's parameters and never calls it. That is right only for a child of
exactly the class it knows, without hooks and without a forward of its own; every other child is
called as a module, so that its hooks fire and its adapter acts.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from fast_transformer.ops import add_norm, linear_act

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# transformers leaves its recorder on modules for good; it does nothing unless outputs are asked for
_DORMANT = "transformers.utils.output_capturing"


def hooked(module: nn.Module) -> bool:
    """Tell whether something happens when `module` is called besides the forward of its class."""
    state = module.__dict__
    if "forward" in state:
        return True
    for name in _HOOKS:
        if state[name]:
            if any(getattr(hook, "__module__", None) != _DORMANT for hook in state[name].values()):
                return True
    return False


def any_hooked(module: nn.Module) -> bool:
    """Tell whether `module` or anything in it is hooked."""
    return hooked(module) or any(
        any_hooked(child) for child in module._modules.values() if child is not None
    )


def plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Tell whether `module` is exactly of one of `classes` and nothing watches or replaces it."""
    return type(module) in classes and not hooked(module)


def obstacles(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, what it is) of every hooked module in `module`, itself included."""
    for name, child in module.named_modules():
        if hooked(child):
            own = "a forward of its own" if "forward" in child.__dict__ else "hooks"
            yield name, f"{type(child).__name__} has {own}"


def is_norm(module: nn.Module) -> bool:
    """Tell whether `module` is layer normalisation over the last dimension and nothing else."""
    from fast_transformer.nn import LayerNorm

    return plain(module, nn.LayerNorm, LayerNorm) and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, (..., K) → (..., N), fused when it is a plain nn.Linear."""
    if plain(module, nn.Linear):
        return linear_act(x, module.weight, module.bias)  # type: ignore[arg-type]
    y: Tensor = module(x)
    return y


def residual_norm(dropout: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """`norm(residual + dropout(x))`, (..., C), in one pass where both modules are plain."""
    if not is_norm(norm):
        y: Tensor = norm(dropout(x) + residual)
        return y
    rate = 0.0
    if not plain(dropout, nn.Dropout):
        x = dropout(x)
    elif dropout.training:
        rate = dropout.p  # type: ignore[assignment]
    return add_norm(
        x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=rate  # type: ignore[arg-type]
    )  # fmt: skip
