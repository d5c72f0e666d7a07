"""What every operator is held to besides its numbers, and programs made of them."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def check_operator(name, arguments):
    """Schema, fake and dispatch of an operator; gradients are registered above them."""
    torch.library.opcheck(
        getattr(torch.ops.fast_transformer, name).default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def gradients(out, inputs):
    """Of `out` by every input that wants one."""
    leaves = [x for x in inputs if x.requires_grad]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return torch.autograd.grad(out, leaves, weights)


def check_fakes(function, inputs):
    """On fake tensors, outputs and gradients have the shapes and strides of real ones."""
    real = function(*inputs)
    grads = gradients(real, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        fake = function(*fakes)
        fake_grads = gradients(fake, fakes)
    for x, y in zip((real, *grads), (fake, *fake_grads), strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
