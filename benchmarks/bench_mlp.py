"""linear_act, mlp and gated_mlp against nn.Linear's function and the activations of PyTorch.

qkv_projection is measured with the attention that it is for.
"""

import math

from torch.nn import functional as F

from fast_transformer.benchmarks.contest import DTYPES, Contest, Entry
from fast_transformer.ops import attention, gated_mlp, linear_act, mlp, qkv_projection
from fast_transformer.testing import GatedMlpCase, MlpCase, QkvCase, cases

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
OURS = {
    "linear_act": linear_act,
    "mlp": mlp,
    "gated_mlp": gated_mlp,
    "qkv_projection": lambda **inputs: attention(*qkv_projection(**inputs)),
}


def contest(case: MlpCase | GatedMlpCase | QkvCase, dtype: str) -> Contest:
    """Ours and PyTorch's, on the same tensors."""
    inputs = case.inputs(DTYPES[dtype])
    theirs = {name: x for name, x in inputs.items() if name not in ("seed", "recompute")}
    ours = Entry(OURS[case.op], inputs, case.wrt)
    peer = Entry(PLAIN[case.op], theirs, case.wrt)
    forward = 2.0 * products(case)
    # backward: the gradient of the input and that of the weight, a product each
    flops = forward, 2 * forward
    if isinstance(case, QkvCase):  # attention's products: two, and five
        B, T, _, heads, _, D = case.shape
        flops = tuple(f + n * 2 * B * heads * T * T * D for f, n in zip(flops, (2, 5), strict=True))
    return Contest(case, dtype, ours, {"pytorch": peer}, flops=flops)


def products(case: MlpCase | GatedMlpCase | QkvCase) -> int:
    """Multiplications of the linear layers' forward pass."""
    if isinstance(case, QkvCase):
        B, T, C, heads, kv_heads, D = case.shape
        return B * T * C * (heads + 2 * kv_heads) * D
    M, *sizes = case.shape
    pairs = [math.prod(pair) for pair in zip(sizes, sizes[1:], strict=False)]
    if isinstance(case, GatedMlpCase):
        pairs.append(pairs[0])
    return M * sum(pairs)


def plain_linear_act(x, weight, bias, activation):
    """Linear, then the activation."""
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def plain_mlp(x, w1, b1, w2, b2, activation, dropout_p=0.0):
    """Linear, activation, dropout, linear."""
    hidden = ACTIVATIONS[activation](F.linear(x, w1, b1))
    return F.linear(F.dropout(hidden, dropout_p) if dropout_p > 0 else hidden, w2, b2)


def plain_gated_mlp(x, w_gate, w_up, w_down, activation):
    """Three linear layers, and the gate between them."""
    gate = ACTIVATIONS[activation](F.linear(x, w_gate))
    return F.linear(gate * F.linear(x, w_up), w_down)


def plain_qkv(x, weights, biases, heads, kv_heads):
    """One linear layer, as nn.MultiheadAttention's projection, and attention."""
    D = weights.shape[0] // (heads + 2 * kv_heads)
    parts = F.linear(x, weights, biases).split((heads * D, kv_heads * D, kv_heads * D), -1)
    query, key, value = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in parts)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != kv_heads)


PLAIN = {
    "linear_act": plain_linear_act,
    "mlp": plain_mlp,
    "gated_mlp": plain_gated_mlp,
    "qkv_projection": plain_qkv,
}
