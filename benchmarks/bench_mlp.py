"""linear_act and mlp against nn.Linear's function and the activations of PyTorch."""

import math

from torch.nn import functional as F

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import linear_act, mlp
from fast_transformer.testing import MlpCase, cases

SUITE = "mlp"
CASES = cases("mlp", "bench")
PEERS = ("pytorch",)
ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def contest(case: MlpCase, dtype: str) -> Contest:
    """Ours and PyTorch's, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype])
    single = case.op == "linear_act"
    theirs = {name: value for name, value in inputs.items() if name != "seed"}
    ours = Entry(linear_act if single else mlp, inputs, case.wrt)
    peer = Entry(plain_linear_act if single else plain_mlp, theirs, case.wrt)
    M, *sizes = case.shape
    forward = 2.0 * M * sum(math.prod(pair) for pair in zip(sizes, sizes[1:], strict=False))
    # backward: the gradient of the input and that of the weight, a product each
    return Contest(case, dtype, ours, {"pytorch": peer}, flops=(forward, 2 * forward))


def plain_linear_act(x, weight, bias, activation):
    """Linear, then the activation."""
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def plain_mlp(x, w1, b1, w2, b2, activation, dropout_p=0.0):
    """Linear, activation, dropout, linear."""
    hidden = ACTIVATIONS[activation](F.linear(x, w1, b1))
    return F.linear(F.dropout(hidden, dropout_p) if dropout_p > 0 else hidden, w2, b2)
