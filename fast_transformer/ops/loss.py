"""Cross-entropy of logits, and of a vocabulary projection whose logits are never formed."""

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu

_CODES = {"none": 0, "mean": 1, "sum": 2}  # as csrc/common/loss.h


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """−log softmax(logits)[target], and z_loss · logsumexp(logits)² (Chowdhery et al. 2022).

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; V ≥ 1.
        target: (...), int64 classes in [0, V), or ignore_index.
        ignore_index: rows with this target count nothing: loss 0, gradient 0, logits not read.
        label_smoothing: ε in [0, 1]; the target becomes (1 − ε) one-hot + ε / V.
        z_loss: ≥ 0, what the square of logsumexp weighs.
        reduction: "mean" over the rows that count (NaN without one), "sum", or "none".

    Returns:
        float32 whatever the dtype of logits, as under autocast (float64 of float64): a scalar, or
        with "none" (...).

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    op = "cross_entropy"
    _check_rows(op, "logits", logits, "V")
    V = logits.shape[-1]
    if V == 0:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}; it must have V ≥ 1.")
    code = _check(op, "logits", logits, target, V, ignore_index, label_smoothing, z_loss, reduction)
    backend = choose(op, BACKENDS, (logits, target))
    if backend == "reference":
        _check_range(op, target, V, ignore_index)
        return reference.cross_entropy(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing,
            z_loss=z_loss, reduction=reduction,
        )  # fmt: skip
    inputs = (cpu.uniform_rows(logits), target, ignore_index, label_smoothing, z_loss, code)
    try:
        if logits.requires_grad and torch.is_grad_enabled():
            return cpu.apply(_CrossEntropy, backend, *inputs)
        return BACKENDS[backend].forward(*inputs)[0]
    except RuntimeError:  # the kernel has looked at the targets first: which of them is wrong?
        _check_range(op, target, V, ignore_index)
        raise


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(hidden weightᵀ + bias, target) without the (tokens × V) logits.

    Args:
        hidden: (..., C), float32, bfloat16, float16 or float64.
        weight: (V, C), as nn.Linear holds it, in hidden's dtype; V ≥ 1.
        target: (...), int64 classes in [0, V), or ignore_index.
        bias: (V,), in hidden's dtype.
        ignore_index: rows with this target count nothing: loss 0, gradient 0, hidden not read.
        label_smoothing: as in cross_entropy.
        z_loss: as in cross_entropy.
        reduction: as in cross_entropy.

    Returns:
        As cross_entropy: float32, or float64 of float64. Logits are float32 too, and not rounded to
        hidden's dtype. The gradient of the logits is, as the operand of products that it is.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    op = "linear_cross_entropy"
    dtype = arguments.autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight = arguments.lower(hidden, dtype), arguments.lower(weight, dtype)
        bias = None if bias is None else arguments.lower(bias, dtype)
    _check_rows(op, "hidden", hidden, "C")
    V = _check_linear(op, hidden, weight, bias)
    code = _check(op, "hidden", hidden, target, V, ignore_index, label_smoothing, z_loss, reduction)
    backend = choose(op, LINEAR_BACKENDS, (hidden, weight, bias, target))
    if backend == "reference":
        _check_range(op, target, V, ignore_index)
        return reference.linear_cross_entropy(
            hidden, weight, target, bias=bias, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction,
        )  # fmt: skip
    needed = (hidden, weight) if bias is None else (hidden, weight, bias)
    hidden, weight = cpu.uniform_rows(hidden), cpu.unit_stride(weight)
    inputs = (hidden, weight, bias, target, ignore_index, label_smoothing, z_loss, code)
    try:
        if torch.is_grad_enabled() and any(x.requires_grad for x in needed):
            return cpu.apply(_LinearCrossEntropy, backend, *inputs)
        return LINEAR_BACKENDS[backend].forward(*inputs)[0]
    except RuntimeError:  # as above
        _check_range(op, target, V, ignore_index)
        raise


def _check_rows(op, name, x, last):
    arguments.floating(op, name, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimension; it must have shape (..., {last}).")


def _check_linear(op, hidden, weight, bias):
    """Check weight (V, C) and bias (V,); returns V."""
    arguments.like(op, "weight", weight, "hidden", hidden)
    C = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != C or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}; hidden has {C} channels, so it must be "
            f"(V, {C}) with V ≥ 1."
        )
    if bias is not None:
        arguments.like(op, "bias", bias, "hidden", hidden)
        arguments.vector(op, "bias", bias, weight.shape[0], "weight")
    return weight.shape[0]


def _check(op, name, x, target, V, ignore_index, label_smoothing, z_loss, reduction):
    """What both losses ask of a target for the rows of `x`, and of their options."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}.")
    if target.dtype is not torch.int64:
        raise TypeError(
            f"{op}: target has dtype {arguments.short(target.dtype)}; accepted is int64."
        )
    arguments.same_device(op, "target", target, name, x)
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: target has shape {tuple(target.shape)}; {name} has rows "
            f"{tuple(x.shape[:-1])}; they must match."
        )
    if not isinstance(ignore_index, (int, torch.SymInt)) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}.")
    arguments.number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; it must lie in [0, 1].")
    arguments.number(op, "z_loss", z_loss)
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss is {z_loss}; it must be finite and not negative.")
    code = _CODES.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(
            f"{op}: reduction is {reduction!r}; accepted are 'mean', 'sum' and 'none'."
        )
    return code


def _check_range(op, target, V, ignore_index):
    """Name a target that is neither a class nor ignored, where one can look."""
    if not arguments.readable(target):
        return
    outside = ((target < 0) | (target >= V)) & (target != ignore_index)
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{op}: target[{', '.join(map(str, at))}] is {target[at].item()}; it must lie in "
            f"[0, {V}) or be ignore_index, {ignore_index}."
        )


# forward(logits, target, ignore_index, label_smoothing, z_loss, reduction) → loss, statistics;
# backward(grad_loss, logits, target, statistics, …) → dlogits
BACKENDS = {
    "cpu": Backend(
        cpu.operator("cross_entropy_fwd"), cpu.operator("cross_entropy_bwd"), cpu.unsupported
    ),
    "reference": Backend(reference.cross_entropy, None, lambda tensors: None),
}

# forward(hidden, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction)
# → loss, statistics; backward(grad_loss, hidden, weight, bias, target, statistics, …,
# need_dhidden, need_dweight, need_dbias) → dhidden, dweight, dbias
LINEAR_BACKENDS = {
    "cpu": Backend(
        cpu.operator("linear_cross_entropy_fwd"),
        cpu.operator("linear_cross_entropy_bwd"),
        cpu.unsupported,
    ),
    "reference": Backend(reference.linear_cross_entropy, None, lambda tensors: None),
}


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, target, *options):
        loss, statistics = BACKENDS[backend].forward(logits, target, *options)
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(logits, target, statistics)
        return loss

    @staticmethod
    @cpu.first_order("cross_entropy")
    def backward(ctx, grad_loss):
        backward = BACKENDS[ctx.backend].backward
        dlogits = backward(grad_loss, *ctx.saved_tensors, *ctx.options)
        return None, dlogits, None, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, hidden, weight, bias, target, *options):
        loss, statistics = LINEAR_BACKENDS[backend].forward(hidden, weight, bias, target, *options)
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(hidden, weight, bias, target, statistics)
        return loss

    @staticmethod
    @cpu.first_order("linear_cross_entropy")
    def backward(ctx, grad_loss):
        needed = ctx.needs_input_grad[1:4]
        backward = LINEAR_BACKENDS[ctx.backend].backward
        grads = backward(grad_loss, *ctx.saved_tensors, *ctx.options, *needed)
        grads = (g if n else None for g, n in zip(grads, needed, strict=True))
        return None, *grads, None, None, None, None, None


def _loss(x, target, reduction):
    return x.new_empty((), dtype=torch.float32) if reduction else _floats(x, target.shape)


def _floats(x, shape):
    return x.new_empty(shape, dtype=torch.float32)


@cpu.fake("cross_entropy_fwd")
def _cross_entropy_fwd_fake(
    logits, target, ignore_index, label_smoothing, z_loss, reduction
):  # fmt: skip
    return _loss(logits, target, reduction), _floats(logits, (target.numel(), 2))


@cpu.fake("cross_entropy_bwd")
def _cross_entropy_bwd_fake(
    grad_loss, logits, target, statistics, ignore_index, label_smoothing, z_loss, reduction
):
    return logits.new_empty(logits.shape)


@cpu.fake("linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd_fake(
    hidden, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction
):
    return _loss(hidden, target, reduction), _floats(hidden, (target.numel(), 2))


@cpu.fake("linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd_fake(
    grad_loss, hidden, weight, bias, target, statistics,
    ignore_index, label_smoothing, z_loss, reduction, need_dhidden, need_dweight, need_dbias,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_dhidden else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
        weight.new_empty(weight.shape[0] if need_dbias else 0),
    )
