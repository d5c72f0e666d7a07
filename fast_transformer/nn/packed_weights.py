"""Packed weights of modules, made for inference, beside the parameters, which stay as they are.

A packed weight is that of one parameter at one moment, told by its memory, its version and its
dtype. Where they changed it is packed anew; an edit through `.data` leaves no trace in them and
needs `fast_transformer.repack`. Training, a wanted gradient, autocast, the compiler, torch.func and
a forced other backend use the parameter itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fast_transformer.backends import chosen
from fast_transformer.ops import cpu
from fast_transformer.ops.arguments import autocast_dtype
from fast_transformer.ops.packed import PackedWeight, pack, packable

Key = tuple[Any, ...]


class PackedParameter:
    """The packed weight of a module's parameter `name`, renewed when that has changed."""

    def __init__(self, name: str, int8: bool) -> None:
        self.name, self.int8 = name, int8
        self._held: tuple[Key, StorageWeakRef, PackedWeight] | None = None

    def __reduce__(self) -> Any:
        return PackedParameter, (self.name, self.int8)  # copies and files carry no packed bytes

    def of(self, module: nn.Module, x: Tensor) -> PackedWeight | None:
        """Return the packed weight for `x`, or None where the parameter must be used."""
        weight: Tensor = getattr(module, self.name)
        if (
            module.training
            or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            or torch.compiler.is_compiling()
            or x.dtype is not weight.dtype
            or type(x) is not Tensor
            or cpu.transformed()
            or chosen() not in (None, "cpu")
            or autocast_dtype(x) is not None
        ):
            return None
        held = self._held  # another thread may renew it meanwhile
        if held is not None and held[0] == _key(weight) and not held[1].expired():  # type: ignore[no-untyped-call]
            return held[2]
        return self.renew(module)

    def renew(self, module: nn.Module) -> PackedWeight | None:
        """Pack the parameter as it is now; None where it cannot be."""
        weight: Tensor = getattr(module, self.name)
        key = _key(weight) if packable(weight) else None
        if key is None:
            self._held = None
            return None
        memory = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        made = pack(weight, self.int8)
        self._held = key, memory, made
        return made

    @property
    def held(self) -> PackedWeight | None:
        """What is packed now."""
        return None if self._held is None else self._held[2]


def _key(weight: Tensor) -> Key | None:
    """Tell one state of a parameter from another; None where it has no version counter.

    Only as long as its memory is its own: a later parameter may get the same address.
    """
    if weight.is_inference():
        return None
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape


def packed_weight(module: nn.Module, x: Tensor) -> PackedWeight | None:
    """Return the packed weight of `module` that holds for `x`, or None."""
    held = module.__dict__.get("_packed_parameter")
    return None if held is None else held.of(module, x)


def packed_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, PackedParameter]]:
    """(name, module, parameter) of every module that has a packed one."""
    for name, module in model.named_modules():
        if "_packed_parameter" in module.__dict__:
            yield name, module, module.__dict__["_packed_parameter"]
