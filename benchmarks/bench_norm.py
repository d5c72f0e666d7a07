"""layer_norm, rms_norm and add_norm against PyTorch's norms and what one adds to them by hand."""

import torch
from torch.nn import functional as F

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import add_norm, layer_norm, rms_norm
from fast_transformer.testing import NormCase, cases

SUITE = "norm"
CASES = cases("norm", "bench")
PEERS = ("pytorch", "by hand")


def contest(case: NormCase, dtype: str) -> Contest:
    """Ours and PyTorch's, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype])
    x = inputs["x"].nbytes
    if not case.added:
        # forward reads x and writes out; backward reads x and dout and writes dx
        ours, plain, moved = FUSED[case.norm], PLAIN[case.norm], (2 * x, 3 * x)
    else:
        ours, plain = first_of_add_norm, plain_add_norm
        # reads x and residual, writes out and, if wanted, the sum; backward reads dout and the
        # sum, and writes one gradient for both, or two where dropout sets them apart
        moved = ((3 + case.return_sum) * x, (3 + (case.dropout_p > 0)) * x)
    unseeded = {name: value for name, value in inputs.items() if name != "seed"}
    peers = {"pytorch": Entry(plain, unseeded, case.wrt)}
    if case.norm == "rms_norm":
        peers["by hand"] = Entry(add_rms_by_hand if case.added else rms_by_hand, unseeded, case.wrt)
    return Contest(case, dtype, Entry(ours, inputs, case.wrt), peers, bytes=moved)


def plain_layer_norm(x, weight, bias=None):
    """F.layer_norm."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def plain_rms_norm(x, weight):
    """F.rms_norm."""
    return F.rms_norm(x, x.shape[-1:], weight)


def rms_by_hand(x, weight):
    """What models write: transformers' LlamaRMSNorm, T5LayerNorm and their like."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1.2e-7)
    return weight * wide.to(x.dtype)


FUSED = {"layer_norm": layer_norm, "rms_norm": rms_norm}
PLAIN = {"layer_norm": plain_layer_norm, "rms_norm": plain_rms_norm}


def first_of_add_norm(**inputs):
    """Ours; the sum is written where it is wanted, the gradient is that of the normalised."""
    out = add_norm(**inputs)
    return out[0] if isinstance(out, tuple) else out


def plain_add_norm(x, residual, weight, bias=None, norm="layer_norm", dropout_p=0.0, **_):
    """Dropout, residual and norm, one after another."""
    total = residual + F.dropout(x, dropout_p) if dropout_p > 0 else residual + x
    if norm == "rms_norm":
        return plain_rms_norm(total, weight)
    return plain_layer_norm(total, weight, bias)


def add_rms_by_hand(x, residual, weight, dropout_p=0.0, **_):
    """Dropout, residual and the models' RMS norm, one after another."""
    total = residual + F.dropout(x, dropout_p) if dropout_p > 0 else residual + x
    return rms_by_hand(total, weight)
