"""A linear layer with its activation, and the two-layer perceptron of a Transformer."""

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu
from fast_transformer.ops.linear_arguments import (
    activation_code,
    autocast,
    check_layer,
    check_x,
    needs_grad,
    output,
    wanted,
)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """activation(x weightᵀ + bias), in one pass.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        weight: (N, K), as nn.Linear holds it, in x's dtype.
        bias: (N,), in x's dtype.
        activation: None, "gelu" (by the error function), "gelu_tanh", "relu" or "silu".

    Returns:
        (..., N) in x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    x, weight, bias = autocast(x, weight, bias)
    op = "linear_act"
    check_x(op, x)
    check_layer(op, x, "x", x.shape[-1], "weight", weight, "bias", bias)
    code = activation_code(op, activation)
    backend = choose(op, LINEAR_BACKENDS, (x, weight, bias))
    if backend == "reference":
        return reference.linear_act(x, weight, bias, activation=activation)
    x, weight = cpu.uniform_rows(x), cpu.unit_stride_either_way(weight)
    if torch.is_grad_enabled() and needs_grad(x, weight, bias):
        return cpu.apply(_LinearAct, backend, x, weight, bias, code)
    return LINEAR_BACKENDS[backend].forward(x, weight, bias, code, False)[0]


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str | None = "gelu",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """dropout(activation(x w1ᵀ + b1)) w2ᵀ + b2, Vaswani et al. 2017, eq. 2.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        w1: (F, C), as nn.Linear holds it, in x's dtype.
        b1: (F,) or None.
        w2: (N, F).
        b2: (N,) or None.
        activation: None, "gelu" (by the error function), "gelu_tanh", "relu" or "silu".
        dropout_p: probability in [0, 1] of dropping a hidden element.
        seed: 0-d int64 tensor from which dropout draws; by default a fresh one each call.
        recompute: keep nothing of the hidden layer for backward, which makes it again and gives the
            same bits. The reference does not heed it.

    Returns:
        (..., N) in x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    op = "mlp"
    check_x(op, x)
    check_layer(op, x, "x", x.shape[-1], "w1", w1, "b1", b1)
    check_layer(op, x, "w1", w1.shape[0], "w2", w2, "b2", b2)
    code = activation_code(op, activation)
    seed = arguments.dropout(op, dropout_p, seed, x.device)
    backend = choose(op, MLP_BACKENDS, (x, w1, b1, w2, b2, seed))
    if backend == "reference":
        return reference.mlp(
            x, w1, b1, w2, b2, activation=activation, dropout_p=dropout_p, seed=seed
        )
    x = cpu.uniform_rows(x)
    w1, w2 = cpu.unit_stride_either_way(w1), cpu.unit_stride_either_way(w2)
    inputs = (x, w1, b1, w2, b2, seed, code, dropout_p)
    if torch.is_grad_enabled() and needs_grad(x, w1, b1, w2, b2):
        return cpu.apply(_Mlp, backend, *inputs, recompute)
    return MLP_BACKENDS[backend].forward(*inputs, False)[0]


# forward(x, weight, bias, activation, save_pre) → y, pre;
# backward(grad_out, x, weight, pre, activation, need_dx, need_dw, need_db) → dx, dw, db
LINEAR_BACKENDS = {
    "cpu": Backend(cpu.operator("linear_act_fwd"), cpu.operator("linear_act_bwd"), cpu.unsupported),
    "reference": Backend(reference.linear_act, None, lambda tensors: None),
}

# forward(x, w1, b1, w2, b2, seed, activation, dropout_p, save_pre) → y, pre;
# backward(grad_out, x, w1, b1, w2, pre, seed, activation, dropout_p, need_dx, need_dw1, need_db1,
# need_dw2, need_db2) → dx, dw1, db1, dw2, db2
MLP_BACKENDS = {
    "cpu": Backend(cpu.operator("mlp_fwd"), cpu.operator("mlp_bwd"), cpu.unsupported),
    "reference": Backend(reference.mlp, None, lambda tensors: None),
}


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias, activation):
        y, pre = LINEAR_BACKENDS[backend].forward(x, weight, bias, activation, True)
        ctx.backend, ctx.activation = backend, activation
        ctx.save_for_backward(x, weight, pre)
        return y

    @staticmethod
    @cpu.first_order("linear_act")
    def backward(ctx, grad_out):
        needed = ctx.needs_input_grad[1:4]
        backward = LINEAR_BACKENDS[ctx.backend].backward
        grad_out = cpu.uniform_rows(grad_out)
        grads = backward(grad_out, *ctx.saved_tensors, ctx.activation, *needed)
        return None, *(g if n else None for g, n in zip(grads, needed, strict=True)), None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, w1, b1, w2, b2, seed, activation, dropout_p, recompute):
        y, pre = MLP_BACKENDS[backend].forward(
            x, w1, b1, w2, b2, seed, activation, dropout_p, not recompute
        )
        ctx.backend, ctx.options = backend, (activation, dropout_p)
        kept = (b1, w2, None) if recompute else (None, w2, pre)  # b1 is of use without pre alone
        ctx.save_for_backward(x, w1, *kept, seed)
        return y

    @staticmethod
    @cpu.first_order("mlp")
    def backward(ctx, grad_out):
        needed = ctx.needs_input_grad[1:6]
        backward = MLP_BACKENDS[ctx.backend].backward
        grad_out = cpu.uniform_rows(grad_out)
        grads = backward(grad_out, *ctx.saved_tensors, *ctx.options, *needed)
        grads = (g if n else None for g, n in zip(grads, needed, strict=True))
        return None, *grads, None, None, None, None


@cpu.fake("linear_act_fwd")
def _linear_act_fwd_fake(x, weight, bias, activation, save_pre):
    pre = output(x, weight) if save_pre and activation else x.new_empty(0)
    return output(x, weight), pre


@cpu.fake("linear_act_bwd")
def _linear_act_bwd_fake(grad_out, x, weight, pre, activation, need_dx, need_dw, need_db):
    return wanted((x, need_dx), (weight, need_dw), (weight[:, 0], need_db))


@cpu.fake("mlp_fwd")
def _mlp_fwd_fake(x, w1, b1, w2, b2, seed, activation, dropout_p, save_pre):
    return output(x, w2), output(x, w1) if save_pre else x.new_empty(0)


@cpu.fake("mlp_bwd")
def _mlp_bwd_fake(
    grad_out, x, w1, b1, w2, pre, seed, activation, dropout_p,
    need_dx, need_dw1, need_db1, need_dw2, need_db2,
):  # fmt: skip
    return wanted(
        (x, need_dx), (w1, need_dw1), (w1[:, 0], need_db1), (w2, need_dw2), (w2[:, 0], need_db2)
    )
