"""How far an op may err: twice as far as plain PyTorch at the same dtype, and one rounding."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fast_transformer import backends, ops

LOGARITHMS = {  # outputs that are logarithms
    "attention": ("1",),
    "attention_decode": ("1",),
    "attention_varlen": ("1",),
    "relative_attention": ("1",),
}
DRAWS = 7
Pair = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # results at a dtype and in float64


def evaluate(op: str, inputs: Mapping[str, Any], wrt: Iterable[str]) -> dict[str, Tensor]:
    """Call the public function and differentiate it: outputs "0", "1", gradients "d<argument>".

    Every output is weighed by random numbers of its own, the same for every dtype.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in wrt}
    outputs = getattr(ops, op)(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {str(i): output.detach() for i, output in enumerate(outputs)}
    if leaves:
        random = torch.Generator().manual_seed(zlib.crc32(op.encode()))
        weights = [torch.randn(x.shape, generator=random).to(x.dtype) for x in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def in_float64(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same arguments with every floating tensor in float64."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def check(
    op: str, inputs: Mapping[str, Any], wrt: Iterable[str] = (), backend: str = "cpu"
) -> None:
    """Run the op and its gradients on `backend` and hold the error to the project's rule.

    How far plain PyTorch errs is one draw of its rounding. Where that is exceeded, more are made,
    each on inputs that differ in their last bit, and the largest of all counts.
    """
    wrt = tuple(wrt)
    logarithms = LOGARITHMS.get(op, ())

    def plain_and_exact(inputs: Mapping[str, Any]) -> Pair:
        with backends.backend("reference"):
            return evaluate(op, inputs, wrt), evaluate(op, in_float64(inputs), wrt)

    with backends.backend(backend):
        got = evaluate(op, inputs, wrt)
    same, exact = plain_and_exact(inputs)
    try:
        assert_close_to_reference(got, same, exact, logarithms)
    except AssertionError:
        draws = [plain_and_exact(_nudged(inputs, wrt, draw)) for draw in range(DRAWS)]
        assert_close_to_reference(got, same, exact, logarithms, draws)


def _nudged(inputs: Mapping[str, Any], names: Iterable[str], draw: int) -> dict[str, Any]:
    """Change the last bit of about half of the numbers in the named tensors."""
    random = torch.Generator().manual_seed(draw)
    nudged = dict(inputs)
    for name in names:
        x = inputs[name].detach().contiguous()
        bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
        flips = torch.randint(0, 2, bits.shape, generator=random, dtype=bits.dtype)
        nudged[name] = (bits ^ flips).view(x.dtype)
    return nudged


def assert_close_to_reference(
    got: Mapping[str, Tensor],
    same: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    logarithms: Iterable[str] = (),
    draws: Iterable[Pair] = (),
) -> None:
    """Raise AssertionError unless each tensor of `got` errs no more than plain PyTorch may.

    got: what is judged; same: the reference at the same dtype; exact: the reference in float64.
    The error against `exact` is at most 2 × that of `same` + eps(dtype) · max|exact|, both in the
    maximum and in the root of the mean square; where `exact` is infinite, so is `got`. A logarithm,
    which `logarithms` names, has an error of eps(dtype) in what it is taken of, so its floor is
    eps(dtype) · max(1, max|exact|). draws: further pairs of `same` and `exact`, on inputs alike; of
    all errors of plain PyTorch the largest counts.
    """
    assert got.keys() == exact.keys() == same.keys(), (got.keys(), same.keys(), exact.keys())
    pairs = [(same, exact), *draws]
    for name, x in got.items():
        truth, plain = exact[name], same[name]
        assert x.shape == truth.shape, f"{name}: shape {x.shape} for {truth.shape}"
        assert x.dtype == plain.dtype, f"{name}: dtype {x.dtype} for {plain.dtype}"
        infinite = truth.isinf()
        assert torch.equal(x[infinite].double(), truth[infinite]), f"{name}: wrong infinities"
        x, truth = (t.double().masked_fill(infinite, 0) for t in (x, truth))
        assert bool(x.isfinite().all()), f"{name}: {int((~x.isfinite()).sum())} are not finite"
        magnitude = max(1.0, _largest(truth)) if name in logarithms else _largest(truth)
        floor = torch.finfo(got[name].dtype).eps * magnitude
        errors = [
            (p[name].double() - e[name]).masked_fill(infinite, 0).nan_to_num() for p, e in pairs
        ]
        for kind, measure in (("largest", _largest), ("mean square", _root_mean_square)):
            error, allowed = measure(x - truth), max(measure(e) for e in errors)
            limit = 2 * allowed + floor
            assert error <= limit, (
                f"{name}: {kind} error {error:.3g} over {limit:.3g} (plain PyTorch errs by "
                f"{allowed:.3g}, values reach {_largest(truth):.3g})"
            )


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
