"""Query, key and value of self-attention in one product, in the layout that attention reads."""

import torch
from torch import Tensor

from fast_transformer import reference
from fast_transformer.backends import Backend, choose
from fast_transformer.ops import arguments, cpu
from fast_transformer.ops.linear_arguments import autocast, check_weight, needs_grad, wanted

_OP = "qkv_projection"
_PARTS = ("query", "key", "value")


def qkv_projection(
    x: Tensor,
    weights: Tensor | tuple[Tensor, Tensor, Tensor],
    biases: Tensor | tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    *,
    heads: int,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x Wqᵀ + bq, x Wkᵀ + bk, x Wvᵀ + bv) by heads, Vaswani et al. 2017, section 3.2.2.

    Args:
        x: (B, T, C), or (tokens, C) of packed sequences; float32, bfloat16, float16 or float64.
        weights: query's (heads · D, C), key's and value's (kv_heads · D, C), in x's dtype; or all
            three one below the other in one tensor, as nn.MultiheadAttention's in_proj_weight.
        biases: in the same form; None where there are none.
        heads: of query.
        kv_heads: of key and value; by default as many.

    Returns:
        query (B, heads, T, D), key and value (B, kv_heads, T, D): views of memory that is
        contiguous in the order of x's rows. Of (tokens, C): (tokens, heads, D), and so on, as
        `attention_varlen` takes them.

    Raises:
        TypeError, ValueError: an argument is not as above. RuntimeError: see `backend`, `strict`.
    """
    packed = isinstance(weights, Tensor)
    kv_heads = heads if kv_heads is None else kv_heads
    _check_heads(heads, kv_heads)
    three_weights, three_biases = _three(weights, biases, packed)
    x, *parameters = autocast(x, *three_weights, *three_biases)
    three_weights, three_biases = parameters[:3], parameters[3:]
    _check(x, three_weights, three_biases, packed, heads, kv_heads)
    backend = choose(_OP, BACKENDS, (x, *three_weights, *three_biases))
    if backend == "reference":
        if packed:
            three_weights, three_biases = _parts(three_weights[0], three_biases[0], heads, kv_heads)
        return reference.qkv_projection(
            x, three_weights, three_biases, heads=heads, kv_heads=kv_heads
        )
    swaps = x.dim() == 3 and not _uniform(x) and _uniform(x.transpose(0, 1))
    x = x.transpose(0, 1) if swaps else cpu.uniform_rows(x)  # (T, B, C) in memory
    three_weights = [w if w is None else cpu.unit_stride(w) for w in three_weights]
    inputs = (x, *three_weights, *three_biases, heads, kv_heads)
    if torch.is_grad_enabled() and needs_grad(x, *three_weights, *three_biases):
        made = cpu.apply(_QkvProjection, backend, *inputs)
    else:
        made = BACKENDS[backend].forward(*inputs)
    if swaps:
        made = tuple(part.transpose(0, 2) for part in made)
    return made


def _uniform(x):
    rows = all(x.stride(d) == x.stride(d + 1) * x.shape[d + 1] for d in range(x.dim() - 2))
    return rows and x.stride(-1) == 1


def _three(weights, biases, packed):
    """Both as triples; of what is packed the first holds all."""
    if packed:
        if biases is not None and not isinstance(biases, Tensor):
            raise TypeError(
                f"{_OP}: biases must be a tensor or None where weights is one tensor, got "
                f"{type(biases).__name__}."
            )
        return (weights, None, None), (biases, None, None)
    biases = (None, None, None) if biases is None else biases
    for name, group in (("weights", weights), ("biases", biases)):
        if not isinstance(group, (tuple, list)) or len(group) != 3:
            got = type(group).__name__
            if isinstance(group, (tuple, list)):
                got = f"{len(group)} of them"
            raise TypeError(
                f"{_OP}: {name} must be three tensors, of query, key and value, or one that holds "
                f"them all, got {got}."
            )
    return weights, biases


def _check_heads(heads, kv_heads):
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        if not isinstance(count, (int, torch.SymInt)) or isinstance(count, bool):
            raise TypeError(f"{_OP}: {name} must be an integer, got {type(count).__name__}.")
        if count < 1:
            raise ValueError(f"{_OP}: {name} is {count}; it must be at least 1.")


def _check(x, weights, biases, packed, heads, kv_heads):
    arguments.floating(_OP, "x", x)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"{_OP}: x has shape {tuple(x.shape)}; it must be (batch, length, C) or (tokens, C)."
        )
    C = x.shape[-1]
    if packed:
        names, counts, said = ("weights",), (heads + 2 * kv_heads,), "heads + 2 kv_heads"
    else:
        names = tuple(f"weights[{i}] ({part})" for i, part in enumerate(_PARTS))
        counts, said = (heads, kv_heads, kv_heads), "its heads"
    for name, weight, count in zip(names, weights, counts, strict=False):
        check_weight(_OP, x, "x", C, name, weight)
        if weight.shape[0] % count:
            raise ValueError(
                f"{_OP}: {name} gives {weight.shape[0]} features, which {count} heads ({said}) do "
                "not divide."
            )
    if not packed:
        D = weights[0].shape[0] // heads
        for name, weight in zip(names[1:], weights[1:], strict=True):
            if weight.shape[0] != kv_heads * D:
                raise ValueError(
                    f"{_OP}: {name} gives {weight.shape[0]} features; {kv_heads} heads of query's "
                    f"head_dim {D} have {kv_heads * D}."
                )
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if bias is None:
            continue
        name = "biases" if packed else f"biases[{i}] ({_PARTS[i]})"
        arguments.like(_OP, name, bias, "x", x)
        arguments.vector(_OP, name, bias, weight.shape[0], "its weight")


def _parts(weight, bias, heads, kv_heads):
    D = weight.shape[0] // (heads + 2 * kv_heads)
    sizes = (heads * D, kv_heads * D, kv_heads * D)
    return weight.split(sizes), (None, None, None) if bias is None else bias.split(sizes)


# forward(x, weight, key_weight, value_weight, bias, key_bias, value_bias, heads, kv_heads) → query,
# key, value: without key_weight and value_weight, weight holds all three, as bias does;
# backward(dq, dk, dv, x, weight, key_weight, value_weight, and whether each is needed) → dx and
# what the gradient of each weight and bias is
BACKENDS = {
    "cpu": Backend(
        cpu.operator("qkv_projection_fwd"), cpu.operator("qkv_projection_bwd"), cpu.unsupported
    ),
    "reference": Backend(reference.qkv_projection, None, lambda tensors: None),
}


class _QkvProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, w_q, w_k, w_v, b_q, b_k, b_v, heads, kv_heads):
        made = BACKENDS[backend].forward(x, w_q, w_k, w_v, b_q, b_k, b_v, heads, kv_heads)
        ctx.backend = backend
        ctx.save_for_backward(x, w_q, w_k, w_v)
        return made

    @staticmethod
    @cpu.first_order("qkv_projection")
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:8]
        x, *weights = ctx.saved_tensors
        if x.dim() == 3:
            grads = [grad.transpose(1, 2) for grad in grads]
        grads = (grad.contiguous() for grad in grads)
        results = BACKENDS[ctx.backend].backward(*grads, x, *weights, *needed)
        results = (g if n else None for g, n in zip(results, needed, strict=True))
        return None, *results, None, None


def _by_heads(x, heads, dim):
    if x.dim() == 2:
        return x.new_empty(x.shape[0], heads, dim)
    return x.new_empty(x.shape[0], x.shape[1], heads, dim).transpose(1, 2)


@cpu.fake("qkv_projection_fwd")
def _qkv_projection_fwd_fake(x, w_q, w_k, w_v, b_q, b_k, b_v, heads, kv_heads):
    dim = w_q.shape[0] // (heads + 2 * kv_heads if w_k is None else heads)
    return tuple(_by_heads(x, n, dim) for n in (heads, kv_heads, kv_heads))


@cpu.fake("qkv_projection_bwd")
def _qkv_projection_bwd_fake(dq, dk, dv, x, w_q, w_k, w_v, need_dx, *needed):
    weights = [x if w is None else w for w in (w_q, w_k, w_v)]
    return wanted(
        (x, need_dx),
        *((w, flag) for w, flag in zip(weights, needed[:3], strict=True)),
        *((w[:, 0], flag) for w, flag in zip(weights, needed[3:], strict=True)),
    )
