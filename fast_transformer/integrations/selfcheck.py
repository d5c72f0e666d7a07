"""Compares a stock module with its accelerated form on a small input, before it is swapped."""

from typing import Any

import torch
from torch import Tensor, nn

from fast_transformer.backends import chosen
from fast_transformer.integrations.registry import Entry, swap, unswap
from fast_transformer.nn.plain import any_hooked

_verdicts: dict[object, str | None] = {}


def verdict(module: nn.Module, entry: Entry) -> str | None:
    """Answer what differs, or None; once for every configuration and process.

    A module is not checked where its stock forward may not simply be run: on the meta device, with
    parameters that are tensor subclasses (sharded, quantised), or with hooks, which would fire.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if entry.sample is None or not tensors or any_hooked(module):
        return None
    if any(t.is_meta or type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return None
    if not tensors[0].is_floating_point():
        return None
    key = _configuration(module, entry)
    if key not in _verdicts:
        _verdicts[key] = _compare(module, entry, tensors[0])
    return _verdicts[key]


def _configuration(module: nn.Module, entry: Entry) -> object:
    """All that decides which way a module's forward goes."""
    settings = tuple(
        (name, key, repr(value))
        for name, child in module.named_modules()
        for key, value in sorted(vars(child).items())
        if isinstance(value, (bool, int, float, str, tuple)) or callable(value)
        if key not in ("training", "layer_idx", "_is_hf_initialized")
    )
    kinds = tuple((type(m), m.extra_repr()) for m in module.modules())
    tensors = tuple((t.dtype, t.device.type) for t in module.parameters())
    return entry.target, settings, kinds, tensors, chosen()


@torch.no_grad()
def _compare(module: nn.Module, entry: Entry, like: Tensor) -> str | None:
    assert entry.sample is not None
    generator = torch.Generator().manual_seed(0)
    inputs = [
        each.to(like.device)
        if isinstance(each, Tensor)
        else torch.randn(each, generator=generator).to(like.device, like.dtype)
        for each in entry.sample(module)
    ]
    modes = {m: m.training for m in module.modules()}
    devices = [like.device] if like.is_cuda else []
    with torch.random.fork_rng(devices), torch.autocast(like.device.type, enabled=False):
        try:
            for m in modes:
                m.training = False
            try:
                expected = _first(module(*inputs))
            except RuntimeError:  # it does not run on such inputs, so there is nothing to compare
                return None
            swap(module, entry.target)
            try:
                found = _first(module(*inputs))
            except RuntimeError as error:  # a forced backend, or strict mode, that refuses
                return f"self-check: {error}"
            finally:
                unswap(module)
        finally:
            for m, mode in modes.items():
                m.training = mode
    if not expected.isfinite().all():  # weights that nobody has initialised yet
        return None
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"self-check: gives {tuple(found.shape)}, {found.dtype}"
    difference = (found - expected).abs().max().item()
    # a step or two of rounding is some eps; what is wired wrongly is off by the values themselves
    allowed = torch.finfo(like.dtype).eps ** 0.5 * expected.abs().max().item()
    return None if difference <= allowed else f"self-check: differs by {difference:.1e}"


def _first(output: Any) -> Tensor:
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result
