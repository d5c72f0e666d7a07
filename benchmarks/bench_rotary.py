"""rotary against what transformers' models do, and the same written with fewer passes."""

import torch

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import rotary
from fast_transformer.testing import RotaryCase, cases

SUITE = "rotary"
CASES = cases("rotary", "bench")
PEERS = ("transformers", "pairs")


def contest(case: RotaryCase, dtype: str) -> Contest:
    """Ours and PyTorch's, on the same tensors; each has cos and sin as it wants them."""
    inputs = case.inputs(DTYPES[dtype])
    ours = Entry(rotary, inputs, case.wrt)
    cos, sin = (inputs[name].to(DTYPES[dtype])[None, None] for name in ("cos", "sin"))
    repeat = torch.repeat_interleave if case.interleaved else repeated
    whole = {name: repeat(x, 2, -1) for name, x in (("cos", cos), ("sin", sin))}
    given = {name: inputs[name] for name in ("query", "key", "interleaved")}
    peers = {
        "transformers": Entry(as_in_transformers, given | whole, case.wrt),
        "pairs": Entry(pair_by_pair, given | {"cos": cos, "sin": sin}, case.wrt),
    }
    # reads query and key and writes them; backward the same with their gradients
    moved = 2 * (inputs["query"].nbytes + inputs["key"].nbytes)
    return Contest(case, dtype, ours, peers, "transformers", bytes=(moved, moved))


def repeated(x, times, dim):
    """All of x, then all of it again, where repeat_interleave would give each of them twice."""
    return torch.cat((x,) * times, dim)


def as_in_transformers(query, key, cos, sin, interleaved):
    """One product with cos and one with sin of x, with the columns of its pairs exchanged."""
    return tuple(_with_the_rest(x, cos, sin, interleaved) for x in (query, key))


def _with_the_rest(x, cos, sin, interleaved):
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return x * cos + exchanged(x, interleaved) * sin
    turning, rest = x[..., :width], x[..., width:]
    return torch.cat((turning * cos + exchanged(turning, interleaved) * sin, rest), -1)


def exchanged(x, interleaved):
    """(a, b) → (−b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def pair_by_pair(query, key, cos, sin, interleaved):
    """Both columns of a pair on their own, then put together."""
    outs = []
    for x in (query, key):
        turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
        both = a * cos - b * sin, b * cos + a * sin
        out = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
        outs.append(torch.cat((out, rest), -1) if rest.shape[-1] else out)
    return tuple(outs)
