"""layer_norm and add_norm against F.layer_norm and what one adds to it by hand."""

from torch.nn import functional as F

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import add_norm, layer_norm
from fast_transformer.testing import NormCase, cases

SUITE = "norm"
CASES = cases("norm", "bench")
PEERS = ("pytorch",)


def contest(case: NormCase, dtype: str) -> Contest:
    """Ours and PyTorch's, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype])
    x = inputs["x"].nbytes
    if not case.added:
        # forward reads x and writes out; backward reads x and dout and writes dx
        pair = Entry(layer_norm, inputs, case.wrt), Entry(plain_norm, inputs, case.wrt)
        moved = (2 * x, 3 * x)
    else:
        wanted = {"return_sum": case.return_sum}
        pair = (
            Entry(first_of_add_norm, inputs, case.wrt),
            Entry(plain_add_norm, {k: v for k, v in inputs.items() if k != "seed"}, case.wrt),
        )
        # reads x and residual, writes out and, if wanted, the sum; backward reads dout and the
        # sum, and writes one gradient for both, or two where dropout sets them apart
        moved = ((3 + wanted["return_sum"]) * x, (3 + (case.dropout_p > 0)) * x)
    return Contest(case, dtype, pair[0], {"pytorch": pair[1]}, bytes=moved)


def plain_norm(x, weight, bias):
    """F.layer_norm."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def first_of_add_norm(**inputs):
    """Ours; the sum is written where it is wanted, the gradient is that of the normalised."""
    out = add_norm(**inputs)
    return out[0] if isinstance(out, tuple) else out


def plain_add_norm(x, residual, weight, bias, dropout_p=0.0, return_sum=False):
    """Dropout, residual and norm, one after another."""
    total = residual + F.dropout(x, dropout_p) if dropout_p > 0 else residual + x
    return F.layer_norm(total, x.shape[-1:], weight, bias)
