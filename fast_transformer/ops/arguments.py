"""Checks that the ops share: each names the argument, what came, and what is accepted.

Values of integer tensors are read only where that is cheap and possible: eagerly, on the CPU. The
C++ kernels check them once more.
"""

import torch
from torch import Tensor

FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_INTEGER = frozenset((torch.int32, torch.int64))


def short(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def floating(op: str, name: str, x: Tensor) -> None:
    """`x` is a tensor of a dtype that the ops compute in."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}.")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} has dtype {short(x.dtype)}; "
            "accepted are float32, bfloat16, float16 and float64."
        )


def like(op: str, name: str, x: Tensor, model_name: str, model: Tensor) -> None:
    """`x` is a tensor of the dtype and device of `model`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}.")
    if x.dtype != model.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {short(x.dtype)} but {model_name} has {short(model.dtype)}; "
            "they must match."
        )
    same_device(op, name, x, model_name, model)


def same_device(op: str, name: str, x: Tensor, model_name: str, model: Tensor) -> None:
    """`x` lies where `model` lies."""
    if x.device != model.device:
        raise ValueError(
            f"{op}: {name} is on device {x.device} but {model_name} is on {model.device}; "
            "they must match."
        )


def vector(op: str, name: str, x: Tensor, size: int, of: str) -> None:
    """`x` has shape (size,)."""
    if x.dim() != 1 or x.shape[0] != size:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; {of} asks for ({size},).")


def parameter(op: str, name: str, x: Tensor, size: int, model_name: str, model: Tensor) -> None:
    """`x` is (size,), of the dtype of `model` or float32, on its device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}.")
    vector(op, name, x, size, model_name)
    same_device(op, name, x, model_name, model)
    if x.dtype is not model.dtype and x.dtype is not torch.float32:
        raise TypeError(
            f"{op}: {name} has dtype {short(x.dtype)}; accepted are float32 and {model_name}'s "
            f"{short(model.dtype)}."
        )


def number(op: str, name: str, value: float) -> None:
    """`value` is a Python number."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")


def dropout(op: str, dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """`dropout_p` is a probability; returns the seed to use, drawn here when none was given."""
    number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it must lie in [0, 1].")
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dim() != 0 or seed.dtype != torch.int64:
            got = type(seed).__name__
            if isinstance(seed, Tensor):
                got = f"a tensor of shape {tuple(seed.shape)} and dtype {short(seed.dtype)}"
            raise TypeError(f"{op}: seed must be a 0-d int64 tensor, got {got}.")
        if seed.device != device:
            raise ValueError(f"{op}: seed is on device {seed.device}; the inputs are on {device}.")
    if dropout_p == 0.0:
        return None
    if seed is None:  # one draw a call, outside the op: checkpointing and compile replay it
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    return seed


def readable(x: Tensor) -> bool:
    """Tell whether the values of `x` can be looked at now: not while tracing, nor on a device."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def integer_tensor(op: str, name: str, x: Tensor, model: Tensor, model_name: str = "query") -> None:
    """`x` is an int32 or int64 tensor on the device of `model`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}.")
    if x.dtype not in _INTEGER:
        raise TypeError(f"{op}: {name} has dtype {short(x.dtype)}; accepted are int32 and int64.")
    same_device(op, name, x, model_name, model)


def integers(op: str, name: str, x: Tensor, size: int | None, model: Tensor) -> None:
    """`x` is a 1-D int32 or int64 tensor, of `size` elements unless that is None."""
    integer_tensor(op, name, x, model)
    if x.dim() != 1 or (size is not None and x.shape[0] != size):
        asked = "one dimension" if size is None else f"({size},), one value per sequence"
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must have {asked}.")


def positions(op: str, name: str, x: Tensor, batch: int, S: int, query: Tensor) -> Tensor:
    """Return `x` as int32: (batch,) positions among the S keys, in [0, S]."""
    integers(op, name, x, batch, query)
    if readable(x):
        for b, value in enumerate(x.tolist()):
            if not 0 <= value <= S:
                raise ValueError(
                    f"{op}: {name}[{b}] is {value}; key has length {S}, so it must lie in [0, {S}]."
                )
    return x.to(torch.int32).contiguous()


def offsets(op: str, name: str, x: Tensor, tokens: int, longest: int, query: Tensor) -> Tensor:
    """Return `x` as int32: (batch + 1,) rising offsets from 0 to `tokens`, steps ≤ `longest`."""
    integers(op, name, x, None, query)
    side = name[-1]
    if x.shape[0] < 1:
        raise ValueError(f"{op}: {name} is empty; it must hold batch + 1 offsets.")
    if readable(x):
        values = x.tolist()
        if values[0] != 0:
            raise ValueError(f"{op}: {name}[0] is {values[0]}; it must be 0.")
        for b in range(1, len(values)):
            length = values[b] - values[b - 1]
            if length < 0:
                raise ValueError(
                    f"{op}: {name} falls from {values[b - 1]} to {values[b]} at {b}; it must rise."
                )
            if length > longest:
                raise ValueError(
                    f"{op}: sequence {b - 1} of {name} has length {length} but max_seqlen_{side} "
                    f"is {longest}."
                )
        if values[-1] != tokens:
            raise ValueError(
                f"{op}: {name} ends at {values[-1]}; it must end at {tokens}, the tokens packed."
            )
    return x.to(torch.int32).contiguous()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what torch.autocast lowers tensors like `x` to, or None where it is off."""
    if not isinstance(x, Tensor) or x.is_meta:
        return None
    device = "cpu" if x.is_cpu else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def lower(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating tensor to autocast's dtype; float64 stays, as it does in PyTorch."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(dtype)
    return x
