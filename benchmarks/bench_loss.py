"""cross_entropy and linear_cross_entropy against F.cross_entropy and F.linear before it."""

from dataclasses import replace

from torch.nn import functional as F

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.loss_cases import LossCase
from fast_transformer.ops import cross_entropy, linear_cross_entropy
from fast_transformer.testing import cases

SUITE = "loss"
CASES = cases("loss", "bench")
PEERS = ("pytorch",)


def contest(case: LossCase, dtype: str) -> Contest:
    """Ours and PyTorch's, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype])
    counted = (inputs["target"] != -100).sum().item() / len(inputs["target"])
    if case.op == "cross_entropy":
        ours, peer = (Entry(f, inputs, case.wrt) for f in (cross_entropy, plain_cross_entropy))
        logits = inputs["logits"].nbytes
        # forward reads the logits of the rows that count, backward too and writes all gradients
        moved = (counted * logits, (1 + counted) * logits)
        return Contest(case, dtype, ours, {"pytorch": peer}, bytes=moved)
    ours, peer = (Entry(f, inputs, case.wrt) for f in (linear_cross_entropy, plain_linear))
    M, C, V = case.shape
    # the projection; backward: the gradients of its two operands, a product each (ours makes the
    # logits once more, which is its own affair)
    forward = 2.0 * counted * M * C * V
    judged = replace(case, shape=(min(M, 77), C, V))  # in float64
    flops = (forward, 2 * forward)
    return Contest(case, dtype, ours, {"pytorch": peer}, flops=flops, judged=judged)


def plain_cross_entropy(logits, target, reduction, label_smoothing=0.0):
    """F.cross_entropy."""
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)


def plain_linear(hidden, weight, target, reduction):
    """F.linear, then F.cross_entropy."""
    return F.cross_entropy(F.linear(hidden, weight), target, reduction=reduction)
