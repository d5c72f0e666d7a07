"""The gated perceptron of LLaMA, Gemma and T5: SwiGLU, GeGLU and their like."""

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import cpu
from fast_transformer.ops.linear_arguments import (
    activation_code,
    autocast,
    check_bias,
    check_weight,
    check_x,
    needs_grad,
    output,
    wanted,
)


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str | None = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """(activation(x w_gateᵀ + b_gate) ∘ (x w_upᵀ + b_up)) w_downᵀ + b_down, Shazeer 2020, eq. 6.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        w_gate: (F, C), as nn.Linear holds it, in x's dtype.
        w_up: (F, C).
        w_down: (N, F).
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU) or None
            (bilinear).
        b_gate: (F,) or None.
        b_up: (F,) or None.
        b_down: (N,) or None.
        recompute: keep nothing of the hidden layer for backward, which makes it again and gives the
            same bits. The reference does not heed it.

    Returns:
        (..., N) in x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = autocast(
        x, w_gate, w_up, w_down, b_gate, b_up, b_down
    )
    op = "gated_mlp"
    check_x(op, x)
    C = x.shape[-1]
    check_weight(op, x, "x", C, "w_gate", w_gate)
    check_weight(op, x, "x", C, "w_up", w_up)
    if w_up.shape != w_gate.shape:
        raise ValueError(
            f"{op}: w_up has shape {tuple(w_up.shape)} but w_gate has {tuple(w_gate.shape)}; they "
            "must match."
        )
    check_weight(op, x, "w_gate", w_gate.shape[0], "w_down", w_down)
    check_bias(op, x, "w_gate", w_gate, "b_gate", b_gate)
    check_bias(op, x, "w_up", w_up, "b_up", b_up)
    check_bias(op, x, "w_down", w_down, "b_down", b_down)
    code = activation_code(op, activation)
    backend = choose(op, BACKENDS, (x, w_gate, w_up, w_down, b_gate, b_up, b_down))
    if backend == "reference":
        return reference.gated_mlp(
            x, w_gate, w_up, w_down,
            activation=activation, b_gate=b_gate, b_up=b_up, b_down=b_down,
        )  # fmt: skip
    x, w_down = cpu.uniform_rows(x), cpu.unit_stride(w_down)
    w_gate, w_up = cpu.unit_stride(w_gate), cpu.unit_stride(w_up)
    inputs = (x, w_gate, b_gate, w_up, b_up, w_down, b_down, code)
    if torch.is_grad_enabled() and needs_grad(x, w_gate, b_gate, w_up, b_up, w_down, b_down):
        return cpu.apply(_GatedMlp, backend, *inputs, recompute)
    return BACKENDS[backend].forward(*inputs, False)[0]


# forward(x, w_gate, b_gate, w_up, b_up, w_down, b_down, activation, save) → y, gate, up: the last
# two are the pre-activations; backward(grad_out, x, w_gate, b_gate, w_up, b_up, w_down, gate, up,
# activation, and whether each is needed) → dx, dw_gate, db_gate, dw_up, db_up, dw_down, db_down
BACKENDS = {
    "cpu": Backend(cpu.operator("gated_mlp_fwd"), cpu.operator("gated_mlp_bwd"), cpu.unsupported),
    "reference": Backend(reference.gated_mlp, None, lambda tensors: None),
}


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, backend, x, w_gate, b_gate, w_up, b_up, w_down, b_down, activation, recompute
    ):  # fmt: skip
        y, gate, up = BACKENDS[backend].forward(
            x, w_gate, b_gate, w_up, b_up, w_down, b_down, activation, not recompute
        )
        ctx.backend, ctx.activation = backend, activation
        if recompute:
            gate = up = None
        else:
            b_gate = b_up = None  # they make gate and up
        ctx.save_for_backward(x, w_gate, b_gate, w_up, b_up, w_down, gate, up)
        return y

    @staticmethod
    @cpu.first_order("gated_mlp")
    def backward(ctx, grad_out):
        needed = ctx.needs_input_grad[1:8]
        backward = BACKENDS[ctx.backend].backward
        grad_out = cpu.uniform_rows(grad_out)
        grads = backward(grad_out, *ctx.saved_tensors, ctx.activation, *needed)
        grads = (g if n else None for g, n in zip(grads, needed, strict=True))
        return None, *grads, None, None


@cpu.fake("gated_mlp_fwd")
def _gated_mlp_fwd_fake(x, w_gate, b_gate, w_up, b_up, w_down, b_down, activation, save):
    gate, up = (output(x, w) if save else x.new_empty(0) for w in (w_gate, w_up))
    return output(x, w_down), gate, up


@cpu.fake("gated_mlp_bwd")
def _gated_mlp_bwd_fake(
    grad_out, x, w_gate, b_gate, w_up, b_up, w_down, gate, up, activation, need_dx,
    need_dw_gate, need_db_gate, need_dw_up, need_db_up, need_dw_down, need_db_down,
):  # fmt: skip
    return wanted(
        (x, need_dx),
        (w_gate, need_dw_gate),
        (w_gate[:, 0], need_db_gate),
        (w_up, need_dw_up),
        (w_up[:, 0], need_db_up),
        (w_down, need_dw_down),
        (w_down[:, 0], need_db_down),
    )
