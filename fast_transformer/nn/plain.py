"""Which children a fused step may see through: the one rule for hooks, adapters and wrappers.

A fused step reads a child's parameters and never calls it. That is right only for a child of
exactly the class it knows, without hooks and without a forward of its own; every other child is
called as a module, so that its hooks fire and its adapter acts.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fast_transformer import ops
from fast_transformer.nn.norm import LayerNorm
from fast_transformer.nn.packed_weights import packed_weight
from fast_transformer.ops.packed import packed_linear, packed_mlp

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# transformers leaves its recorder on modules for good; it does nothing unless outputs are asked for
_DORMANT = "transformers.utils.output_capturing"
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def hooked(module: nn.Module) -> bool:
    """Tell whether something happens when `module` is called besides the forward of its class."""
    state = module.__dict__
    # profilers and FLOP counters set hooks on every module
    if "forward" in state or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return any(
        getattr(hook, "__module__", None) != _DORMANT
        for name in _HOOKS
        for hook in state[name].values()
    )


def any_hooked(module: nn.Module) -> bool:
    """Tell whether `module` or anything in it is hooked."""
    return any(hooked(each) for each in module.modules())


def plain(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Tell whether `module` is exactly of one of `classes` and nothing watches or replaces it."""
    return module is not None and type(module) in classes and not hooked(module)


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether `module` is a linear layer and nothing else."""
    return plain(module, *_LINEAR)


def is_norm(module: nn.Module | None) -> bool:
    """Tell whether `module` is layer normalisation over the last dimension and nothing else."""
    if not plain(module, nn.LayerNorm, LayerNorm):
        return False
    return len(module.normalized_shape) == 1  # type: ignore[union-attr, arg-type]


def activation_name(activation: Any) -> str | None:
    """Return the ops' name of a torch.nn layer's activation, or None where they have none."""
    if type(activation) is nn.GELU:  # a subclass may have a forward of its own
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if type(activation) is nn.ReLU or activation in (F.relu, F.relu_):
        return "relu"
    if type(activation) is nn.SiLU or activation is F.silu:
        return "silu"
    return "gelu" if activation is F.gelu else None


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, (..., K) → (..., N), fused when it is a plain linear layer."""
    if is_linear(module):
        weight, bias = packed_weight(module, x), module.bias
        if weight is not None and _fits(module, x):
            return packed_linear(x, weight, bias)  # type: ignore[arg-type]
        return ops.linear_act(x, module.weight, bias)  # type: ignore[arg-type]
    y: Tensor = module(x)
    return y


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, (..., C), fused when it is a plain layer norm."""
    if is_norm(module):
        return ops.layer_norm(x, module.weight, module.bias, module.eps)  # type: ignore[arg-type]
    y: Tensor = module(x)
    return y


def residual_norm(dropout: nn.Module, module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """`module(residual + dropout(x))`, (..., C), in one pass where both modules are plain."""
    if not is_norm(module):
        y: Tensor = module(residual + dropout(x))
        return y
    x, rate = _rate(dropout, x)
    return ops.add_norm(
        x, residual, module.weight, module.bias, eps=module.eps, dropout_p=rate  # type: ignore[arg-type]
    )  # fmt: skip


def residual_norm_and_sum(
    dropout: nn.Module, module: nn.Module, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """`module(sum)` and `sum` = `residual + dropout(x)`, in one pass where both are plain."""
    if not is_norm(module):
        total = residual + dropout(x)
        return module(total), total
    x, rate = _rate(dropout, x)
    out, total = ops.add_norm(
        x, residual, module.weight, module.bias,  # type: ignore[arg-type]
        eps=module.eps, dropout_p=rate, return_sum=True,  # type: ignore[arg-type]
    )  # fmt: skip
    return out, total


def feed_forward(
    first: nn.Module, second: nn.Module, dropout: nn.Module, activation: Any, x: Tensor
) -> Tensor:
    """`second(dropout(activation(first(x))))`, fused as far as its parts are plain."""
    name = activation_name(activation)
    if hooked(activation) if isinstance(activation, nn.Module) else False:
        name = None
    if name is None or not (is_linear(first) and is_linear(second) and plain(dropout, nn.Dropout)):
        return linear(second, dropout(activation(linear(first, x))))
    return perceptron(first, second, name, x, _rate(dropout, x)[1])


def perceptron(
    first: nn.Module, second: nn.Module, activation: str, x: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """`second(dropout(activation(first(x))))` of two plain linear layers, in one op."""
    w1, w2 = packed_weight(first, x), packed_weight(second, x)
    if w1 is not None and w2 is not None and dropout_p == 0.0 and _fits(first, x):
        return packed_mlp(
            x, w1, first.bias, w2, second.bias, activation=activation  # type: ignore[arg-type]
        )  # fmt: skip
    return ops.mlp(
        x, first.weight, first.bias, second.weight, second.bias,  # type: ignore[arg-type]
        activation=activation, dropout_p=dropout_p,
    )  # fmt: skip


def _fits(module: nn.Module, x: Tensor) -> bool:
    """Tell whether x has the features of a linear layer; where not, the public op says it best."""
    return x.shape[-1:] == (module.in_features,)  # type: ignore[comparison-overlap]


def _rate(dropout: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """What is left to drop: x and the rate of a plain module, or the module's output and 0."""
    if not plain(dropout, nn.Dropout):
        return dropout(x), 0.0
    return x, dropout.p if dropout.training else 0.0  # type: ignore[return-value]
