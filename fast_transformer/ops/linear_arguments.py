"""Checks of the arguments that the ops made of linear layers share."""

from torch import Tensor

from fast_transformer.ops import arguments

CODES = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}  # as csrc/common/mlp.h


def autocast(x, *parameters):
    """Return them all at the dtype that torch.autocast asks for."""
    dtype = arguments.autocast_dtype(x)
    if dtype is None:
        return x, *parameters
    return arguments.lower(x, dtype), *(arguments.lower(p, dtype) for p in parameters)


def check_x(op, x):
    """`x` is floating, (..., features)."""
    arguments.floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimension; its last one holds the input features.")


def check_weight(op, x, source, features, name, weight):
    """`weight` is (N, features), of x's dtype; `source` is what it reads."""
    arguments.like(op, name, weight, "x", x)
    if weight.dim() != 2 or weight.shape[1] != features:
        gives = f"x has {features} features" if source == "x" else f"{source} gives {features}"
        raise ValueError(
            f"{op}: {name} has shape {tuple(weight.shape)}; {gives}, so it must be "
            f"(out, {features})."
        )


def check_bias(op, x, weight_name, weight, name, bias):
    """`bias` is None or (N,), of x's dtype."""
    if bias is not None:
        arguments.like(op, name, bias, "x", x)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(bias.shape)}; {weight_name} gives "
                f"{weight.shape[0]} features, so it must be ({weight.shape[0]},)."
            )


def check_layer(op, x, source, features, weight_name, weight, bias_name, bias):
    """One linear layer: weight (N, features) and bias (N,); `source` is what it reads."""
    check_weight(op, x, source, features, weight_name, weight)
    check_bias(op, x, weight_name, weight, bias_name, bias)


def activation_code(op, activation):
    """Return the number by which the kernels know an activation."""
    named = activation is None or isinstance(activation, str)
    if not named or activation not in CODES:
        raise ValueError(
            f"{op}: activation is {activation!r}; accepted are None, 'gelu', 'gelu_tanh', 'relu' "
            "and 'silu'."
        )
    return CODES[activation]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Tell whether any of them, of which some may be None, needs a gradient."""
    return any(x is not None and x.requires_grad for x in tensors)


def output(x, weight):
    """Something like x weightᵀ, for a fake."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def wanted(*pairs):
    """Something like each tensor whose flag is set, and something empty for the others."""
    return tuple(_as_it_lies(x) if flag else x.new_empty(0) for x, flag in pairs)


def _as_it_lies(x):
    if x.dim() == 2 and x.stride(1) != 1 and x.shape[1] > 1:  # a weight that lies transposed
        return x.new_empty(x.shape[::-1]).t()
    return x.new_empty(x.shape)
