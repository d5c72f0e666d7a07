"""What every C++ operator is held to besides its numbers."""

import torch


def check_operator(name, arguments):
    """Schema, fake and dispatch of an operator; gradients are registered above them."""
    torch.library.opcheck(
        getattr(torch.ops.fast_transformer, name).default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
