"""What every C++ kernel on the CPU asks of a call, and how it meets the compiler."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fast_transformer import _library

_MISSING = _library.status().reason  # None when the kernels are loaded
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def operator(name: str):
    """Return the C++ operator `name`, or None where the kernels are missing."""
    return None if _MISSING is not None else getattr(torch.ops.fast_transformer, name).default


def missing() -> str | None:
    """Answer why there are no CPU kernels, or None where they are loaded."""
    return _MISSING


def fake(name: str):
    """Register the decorated function as what FakeTensor and the compiler run for `name`."""
    if _MISSING is not None:
        return lambda function: function
    return torch.library.register_fake(f"fast_transformer::{name}")


def unsupported(tensors: tuple[Any, ...]) -> str | None:
    """Answer why the CPU kernels cannot take these tensors, of which all but the first may be None.

    The answer is None when they can.
    """
    if _MISSING is not None:
        return _MISSING
    if tensors[0].dtype not in _DTYPES:
        return f"dtype {str(tensors[0].dtype).removeprefix('torch.')}"
    for x in tensors:
        if x is not None:
            if type(x) is not Tensor and type(x) is not Parameter and not _traced(x):
                return f"tensor subclass {type(x).__name__}"
            if not x.is_cpu:
                return f"device {x.device.type}"
    if transformed():
        return "torch.func transforms and forward-mode derivatives"
    return None


def transformed() -> bool:
    """Tell whether tensors may carry what the kernels do not see, though they look plain."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _traced(x: Tensor) -> bool:
    """Tell whether the compiler stands behind this subclass and runs our fakes."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, (FakeTensor, FunctionalTensor))


def unit_stride(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last dimension, copied only where it has none."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def unit_stride_either_way(weight: Tensor) -> Tensor:
    """Return `weight` with contiguous rows or columns, copied only where it has neither."""
    return weight if weight.stride(0) == 1 else unit_stride(weight)


def uniform_rows(x: Tensor) -> Tensor:
    """Return `x` (..., C) as rows of contiguous elements, one uniform stride apart."""
    if x.is_contiguous():
        return x
    rows = all(x.stride(d) == x.stride(d + 1) * x.shape[d + 1] for d in range(x.dim() - 2))
    return x if rows and x.stride(-1) == 1 else x.contiguous()


def apply(function, *arguments):
    """Call `function.apply`, 1.5 µs cheaper, and so that Dynamo can trace it."""
    if torch.compiler.is_compiling():  # which refuses to see one tensor in two places
        arguments = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in arguments)
        return function.apply(*arguments)
    # Function.apply looks for torch.func's wrappers first; `unsupported` has excluded them
    return super(torch.autograd.Function, function).apply(*arguments)


def first_order(op: str):
    """Make a backward raise a clear error when somebody differentiates it a second time."""

    def decorate(backward):
        def guarded(ctx, *grads):
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return backward(ctx, *grads)
            read = _ReadOnce(ctx)
            with torch.no_grad():
                results = backward(read, *grads)
            # what a gradient depends on: one who asks for the derivative by that gets here
            sources = [
                x for x in (*grads, *read.saved_tensors) if x is not None and x.requires_grad
            ]
            return tuple(
                None
                if dx is None
                else _NoSecondDerivative.apply(op, dx.detach().requires_grad_(), *sources)
                for dx in results
            )

        return guarded

    return decorate


class _ReadOnce:
    """A ctx whose saved tensors are unpacked once, as checkpointing asks."""

    def __init__(self, ctx):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name):
        return getattr(self._ctx, name)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, dx, *sources):
        ctx.op = op
        return dx.view_as(dx)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            f"{ctx.op}: its fused kernels have no second derivative; "
            'run the forward pass under fast_transformer.backend("reference").'
        )
