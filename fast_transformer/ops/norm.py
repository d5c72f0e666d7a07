"""Layer and RMS normalisation, alone and fused with the residual step before them."""

import math
from typing import Any

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias over the last dimension, Ba et al. 2016.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        weight: (C,), x's dtype or float32.
        bias: (C,), x's dtype or float32.
        eps: added to the variance.

    Returns:
        x's shape and dtype, contiguous; statistics are taken in float32.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    _check("layer_norm", x, weight, bias, eps)
    backend = choose("layer_norm", BACKENDS, (x, weight, bias))
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    if torch.is_grad_enabled() and _needs_grad(x, weight, bias):
        x = cpu.uniform_rows(x)
        return cpu.apply(_Norm, backend, x, None, weight, bias, None, LAYER, eps, 0.0, False)
    return PLAIN[backend](cpu.uniform_rows(x), None, weight, bias, None, LAYER, eps, 0.0)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """(x / √(mean(x²) + eps)) · weight over the last dimension, Zhang and Sennrich 2019.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        weight: (C,), x's dtype or float32.
        eps: added to the mean square; by default, as in PyTorch, the epsilon of float32, and for
            float64 of that.

    Returns:
        x's shape and dtype, contiguous; the mean square and the product with weight are taken in
        float32.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    if eps is None:
        eps = _rms_eps("rms_norm", x)
    _check("rms_norm", x, weight, None, eps)
    backend = choose("rms_norm", BACKENDS, (x, weight))
    if backend == "reference":
        return reference.rms_norm(x, weight, eps)
    if torch.is_grad_enabled() and _needs_grad(x, weight, None):
        x = cpu.uniform_rows(x)
        return cpu.apply(_Norm, backend, x, None, weight, None, None, RMS, eps, 0.0, False)
    return PLAIN[backend](cpu.uniform_rows(x), None, weight, None, None, RMS, eps, 0.0)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer_norm",
    eps: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | Any:  # a pair on request
    """norm(h) with h = residual + dropout(x), a Transformer's residual step in one pass.

    Args:
        x: (..., C), what the sublayer computed; float32, bfloat16, float16 or float64.
        residual: x's shape and dtype (under autocast, both are taken to the wider dtype).
        weight: (C,), x's dtype or float32.
        bias: (C,), x's dtype or float32; RMS norm has none.
        norm: "layer_norm" or "rms_norm".
        eps: as that function has it; by default 1e-5 for layer_norm.
        dropout_p: probability in [0, 1] of dropping an element of x.
        seed: 0-d int64 tensor from which dropout draws; by default a fresh one each call.
        return_sum: return h too, for a pre-norm Transformer's next residual step.

    Returns:
        norm(h), or with return_sum (norm(h), h); both of x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    kind = NORMS.get(norm) if isinstance(norm, str) else None
    if kind is None:
        accepted = " and ".join(map(repr, NORMS))
        raise ValueError(f"add_norm: norm is {norm!r}; accepted are {accepted}.")
    if arguments.autocast_dtype(x) is not None:
        x, residual = _promote(x, residual)
    if kind == RMS and bias is not None:
        raise ValueError("add_norm: bias is given but norm is 'rms_norm', which has none.")
    if eps is None:
        eps = _rms_eps("add_norm", x) if kind == RMS else 1e-5
    _check("add_norm", x, weight, bias, eps)
    arguments.like("add_norm", "residual", residual, "x", x)
    if residual.shape != x.shape:
        raise ValueError(
            f"add_norm: residual has shape {tuple(residual.shape)} but x has {tuple(x.shape)}; "
            "they must match."
        )
    seed = arguments.dropout("add_norm", dropout_p, seed, x.device)
    backend = choose("add_norm", BACKENDS, (x, residual, weight, bias, seed))
    if backend == "reference":
        out, total = reference.add_norm(
            x, residual, weight, bias, norm=norm, eps=eps, dropout_p=dropout_p, seed=seed
        )
        return (out, total) if return_sum else out
    x, residual = cpu.uniform_rows(x), cpu.uniform_rows(residual)
    inputs = (x, residual, weight, bias, seed, kind, eps, dropout_p)
    if torch.is_grad_enabled() and (residual.requires_grad or _needs_grad(x, weight, bias)):
        return cpu.apply(_Norm, backend, *inputs, return_sum)
    return BACKENDS[backend].forward(*inputs, True)[:2] if return_sum else PLAIN[backend](*inputs)


def _rms_eps(op, x):
    """PyTorch's: of the dtype that it computes in."""
    if not isinstance(x, Tensor):
        arguments.floating(op, "x", x)
    return _EPS64 if x.dtype is torch.float64 else _EPS32


def _check(op, x, weight, bias, eps):
    if not isinstance(x, Tensor) or x.dtype not in arguments.FLOATING:
        arguments.floating(op, "x", x)
    shape, dtype, device = x.shape[-1:], x.dtype, x.device
    if not shape:
        raise ValueError(f"{op}: x has no dimension; it must have shape (..., C).")
    # written out for weight and for bias: a loop or a call would take a tenth of the call's budget
    if weight is not None and (
        not isinstance(weight, Tensor)
        or weight.shape != shape
        or (weight.dtype is not dtype and weight.dtype is not torch.float32)
        or weight.device != device
    ):
        _reject(op, "weight", weight, x)
    if bias is not None and (
        not isinstance(bias, Tensor)
        or bias.shape != shape
        or (bias.dtype is not dtype and bias.dtype is not torch.float32)
        or bias.device != device
    ):
        _reject(op, "bias", bias, x)
    if type(eps) is not float:
        arguments.number(op, "eps", eps)
    if eps < 0.0:
        raise ValueError(f"{op}: eps is {eps}; it must not be negative.")


def _reject(op, name, parameter, x):
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(parameter).__name__}.")
    if parameter.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(parameter.shape)}; x's last dimension asks for "
            f"({x.shape[-1]},)."
        )
    arguments.same_device(op, name, parameter, "x", x)
    raise TypeError(
        f"{op}: {name} has dtype {arguments.short(parameter.dtype)}; accepted are float32 and "
        f"x's {arguments.short(x.dtype)}."
    )


def _promote(x, residual):
    """Under autocast a sublayer answers in the lower dtype: the sum takes the wider of the two."""
    if isinstance(residual, Tensor) and residual.is_floating_point() and x.is_floating_point():
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return x.to(dtype), residual.to(dtype)
    return x, residual


def _needs_grad(x, weight, bias):
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def _cast(x, dtype):
    return x if x.dtype is dtype else x.to(dtype)  # `to` takes 0.2 µs to do nothing


NORMS = {"layer_norm": 0, "rms_norm": 1}  # the codes of ft::NormKind in csrc/common/norm.h
LAYER, RMS = NORMS.values()
_EPS32, _EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps

_forward, _backward = cpu.operator("norm_fwd"), cpu.operator("norm_bwd")

# forward(x, residual, weight, bias, seed, norm, eps, dropout_p, save_sum) → out, sum, mean, rstd;
# backward(grad_out, grad_sum, sum, mean, rstd, weight, seed, norm, dropout_p, has_weight, has_bias)
# → dresidual, dx, dweight, dbias
BACKENDS = {
    "cpu": Backend(_forward, _backward, cpu.unsupported),
    "reference": Backend(reference.add_norm, None, lambda tensors: None),
}


# (x, residual, weight, bias, seed, norm, eps, dropout_p) → out, and nothing that backward needs
PLAIN = {"cpu": cpu.operator("norm")}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, residual, weight, bias, seed, norm, eps, dropout_p, return_sum):
        added = residual is not None
        out, total, mean, rstd = BACKENDS[backend].forward(
            x, residual, weight, bias, seed, norm, eps, dropout_p, added
        )
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.norm, ctx.dropout_p = backend, norm, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(total if added else x, mean, rstd, weight, seed)
        return (out, total) if return_sum else out

    @staticmethod
    @cpu.first_order("norm")
    def backward(ctx, grad_out, grad_sum=None):
        total, mean, rstd, weight, seed = ctx.saved_tensors
        grad_out = torch.zeros_like(total) if grad_out is None else cpu.uniform_rows(grad_out)
        if grad_sum is not None:
            grad_sum = cpu.uniform_rows(grad_sum)
        _, for_x, for_residual, for_weight, for_bias, *_ = ctx.needs_input_grad
        dresidual, dx, dweight, dbias = BACKENDS[ctx.backend].backward(
            grad_out, grad_sum, total, mean, rstd, weight, seed, ctx.norm, ctx.dropout_p,
            for_weight, for_bias,
        )  # fmt: skip
        if ctx.dropout_p == 0.0:
            dx = dresidual
        return (
            None,
            dx if for_x else None,
            dresidual if for_residual else None,
            _cast(dweight, weight.dtype) if for_weight else None,
            _cast(dbias, ctx.bias_dtype) if for_bias else None,
            *(None, None, None, None, None),
        )


@cpu.fake("norm")
def _norm_fake(x, residual, weight, bias, seed, norm, eps, dropout_p):
    return x.new_empty(x.shape)


@cpu.fake("norm_fwd")
def _norm_fwd_fake(x, residual, weight, bias, seed, norm, eps, dropout_p, save_sum):
    rows = math.prod(x.shape[:-1])
    total = x.new_empty(x.shape) if save_sum else x.new_empty(0)
    mean = x.new_empty(0 if norm == RMS else rows, dtype=torch.float32)
    return x.new_empty(x.shape), total, mean, x.new_empty(rows, dtype=torch.float32)


@cpu.fake("norm_bwd")
def _norm_bwd_fake(
    grad_out, grad_sum, total, mean, rstd, weight, seed, norm, dropout_p, has_weight, has_bias
):
    def columns(wanted):
        return grad_out.new_empty(total.shape[-1] if wanted else 0, dtype=torch.float32)

    dx = total.new_empty(total.shape) if dropout_p > 0 else total.new_empty(0)
    return total.new_empty(total.shape), dx, columns(has_weight), columns(has_bias)
