"""A step of AdamW against torch.optim's three ways, alone and after clip_grad_norm_.

All contenders update the same parameters and state, so that a model fits that fills the memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from fast_transformer import backends, optim, testing
from fast_transformer.benchmarks.contest import DTYPES, Result, physical_limit
from fast_transformer.benchmarks.memory import peak_memory
from fast_transformer.timing import interleaved

SUITE = "optimizer"
Shapes = Sequence[tuple[int, ...]]
MAX_NORM = 1.0
JUDGED = 2000  # elements of each tensor


def _transformer(width: int, layers: int, tables: Sequence[int], *, fused_qkv: bool) -> Shapes:
    """Tables of embeddings, norms, and per layer attention and an MLP, weights and biases."""
    attention = [(3 * width, width)] if fused_qkv else [(width, width)] * 3
    linears = [*attention, (width, width), (4 * width, width), (width, 4 * width)]
    layer = [shape for rows, columns in linears for shape in ((rows, columns), (rows,))]
    layer += [(width,)] * 4
    return [*((rows, width) for rows in tables), *layer * layers, (width,), (width,)]


SHAPES: dict[str, Shapes] = {
    "1M": [(1 << 20,)],
    "200x1000": [(1000,)] * 200,
    "minilm": _transformer(384, 6, (30522, 512, 2), fused_qkv=False),
    "gpt2-small": _transformer(768, 12, (50257, 1024), fused_qkv=True),
}
QUICK = ("200x1000",)
Optimizers = dict[str, torch.optim.Optimizer]


def results(
    only: str, dtypes: Sequence[str], rounds: int, compiled: bool, quick: bool
) -> Iterator[Result]:
    """Every model at every dtype, without clipping and with it."""
    for name, shapes in SHAPES.items():
        if only not in name or (quick and name not in QUICK):
            continue
        for dtype in dtypes:
            yield from of_model(name, shapes, dtype, rounds, compiled)


def of_model(
    name: str, shapes: Shapes, dtype: str, rounds: int, compiled: bool
) -> Iterator[Result]:
    """Judge on a part of every tensor, then time all contenders on the same memory."""
    params = parameters(shapes, DTYPES[dtype])
    size = sum(p.nbytes for p in params)
    for step, max_norm, passes in (("step", None, 7), ("clipped", MAX_NORM, 8)):
        common = {
            "suite": SUITE, "case": name, "kind": "adamw", "dtype": dtype, "step": step,
            "shape": (sum(p.numel() for p in params),),
        }  # fmt: skip
        try:
            backend, error, plain_error = judge(shapes, dtype, max_norm)
        except AssertionError as wrong:
            yield Result(**common, wrong=str(wrong))
            continue
        calls = contenders(params, max_norm, compiled)
        yield Result(
            **common, memory={name: peak_memory(call) for name, call in calls.items()},
            timings=interleaved(calls, rounds, seconds=0.003), bytes=passes * size,
            limit=in_place_rate(passes * size, dtype), backend=backend,
            error=error, plain_error=plain_error,
        )  # fmt: skip


def in_place_rate(moved: int, dtype: str) -> float | None:
    """Bytes a second that a step could move.

    A copy moves three lines and counts two, for it reads what it overwrites. A step overwrites only
    what it has read.
    """
    rate = physical_limit(None, moved, dtype)
    return rate and 1.5 * rate


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[nn.Parameter]:
    """Normal values of a weight's size, with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).mul_(0.02).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape).mul_(0.001).to(dtype)
    return params


def contenders(
    params: list[nn.Parameter], max_norm: float | None, compiled: bool
) -> dict[str, Callable[[], object]]:
    """Steps of everyone, which share what they update."""
    ours = optim.AdamW(params, max_grad_norm=max_norm)
    peers = {
        "fused": torch.optim.AdamW(params, fused=True),
        "foreach": torch.optim.AdamW(params, foreach=True),
        "for-loop": torch.optim.AdamW(params, foreach=False),
    }
    ours.step()
    calls: dict[str, Callable[[], object]] = {"ours": ours.step}
    for name, optimizer in peers.items():
        optimizer.state = ours.state
        calls[name] = clipped(params, optimizer.step, max_norm)
    if compiled:
        torch._dynamo.reset()
        optimizer = torch.optim.AdamW(params, foreach=True)
        optimizer.state = ours.state
        step = torch.compile(lambda: optimizer.step())
        calls["compiled"] = clipped(params, step, max_norm)
    return calls


def clipped(
    params: list[nn.Parameter], step: Callable[[], object], max_norm: float | None
) -> Callable[[], object]:
    """clip_grad_norm_ first, where there is a norm."""
    if max_norm is None:
        return step

    def call():
        nn.utils.clip_grad_norm_(params, max_norm)
        step()

    return call


def judge(shapes: Shapes, dtype: str, max_norm: float | None) -> tuple[str, float, float]:
    """Hold three steps to the project's rule of error; AssertionError where they fail.

    Returns the backend and the largest errors of ours and of torch's foreach against float64,
    relative to the largest parameter.
    """
    shapes = [(min(math.prod(shape), JUDGED),) for shape in shapes]
    found = []
    with backends.record() as met:
        for kind, of in ((optim.AdamW, dtype), (torch.optim.AdamW, dtype), (torch.optim.AdamW, "")):
            params = parameters(shapes, DTYPES[dtype])
            for p in () if of else params:
                p.data, p.grad = p.data.double(), p.grad.double()
            ours = kind is optim.AdamW
            optimizer = kind(params, **({"max_grad_norm": max_norm} if ours else {"foreach": True}))
            step = clipped(params, optimizer.step, None if ours else max_norm)
            for _ in range(3):
                step()
            found.append({"params": torch.cat([p.detach() for p in params])})
    testing.assert_close_to_reference(*found)
    got, plain, exact = (x["params"].double() for x in found)
    size = exact.abs().max().item()
    errors = [(x - exact).abs().max().item() / size for x in (got, plain)]
    return met[0].backend, *errors
