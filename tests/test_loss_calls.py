"""The losses' errors, modules, compiler and copies."""

import copy
import pickle
import re

import pytest
import torch
from operators import check_operator
from torch import nn
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer.backends import record

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def t(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def i(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def ce(logits=None, target=None, **options):
    logits, target = t(3, 8) if logits is None else logits, i(1, 2, 7) if target is None else target
    return lambda: ft.cross_entropy(logits, target, **options)


def lce(hidden=None, weight=None, target=None, **options):
    hidden, weight = t(3, 4) if hidden is None else hidden, t(8, 4) if weight is None else weight
    target = i(1, 2, 7) if target is None else target
    return lambda: ft.linear_cross_entropy(hidden, weight, target, **options)


ERRORS = [
    (ce([1.0]), TypeError, "cross_entropy: logits must be a tensor, got list."),
    (
        ce(t(3, 8).long()),
        TypeError,
        "cross_entropy: logits has dtype int64; accepted are float32, bfloat16, float16 and "
        "float64.",
    ),
    (
        ce(t(), i()),
        ValueError,
        "cross_entropy: logits has no dimension; it must have shape (..., V).",
    ),
    (ce(t(3, 0)), ValueError, "cross_entropy: logits has shape (3, 0); it must have V ≥ 1."),
    (ce(target=3), TypeError, "cross_entropy: target must be a tensor, got int."),
    (
        ce(target=i(1, 2, 3, dtype=torch.int32)),
        TypeError,
        "cross_entropy: target has dtype int32; accepted is int64.",
    ),
    (
        ce(target=t(3, 8)),
        TypeError,
        "cross_entropy: target has dtype float32; accepted is int64.",
    ),
    (
        ce(target=i(1, 2)),
        ValueError,
        "cross_entropy: target has shape (2,); logits has rows (3,); they must match.",
    ),
    (
        ce(target=torch.zeros(3, dtype=torch.int64, device="meta")),
        ValueError,
        "cross_entropy: target is on device meta but logits is on cpu; they must match.",
    ),
    (
        ce(target=i(1, 8, 2)),
        ValueError,
        "cross_entropy: target[1] is 8; it must lie in [0, 8) or be ignore_index, -100.",
    ),
    (
        ce(t(1, 3, 8), i(1, -1, -100)[None]),
        ValueError,
        "cross_entropy: target[0, 1] is -1; it must lie in [0, 8) or be ignore_index, -100.",
    ),
    (
        ce(t(3, 8).requires_grad_(), i(-100, 2, 3), ignore_index=2),
        ValueError,
        "cross_entropy: target[0] is -100; it must lie in [0, 8) or be ignore_index, 2.",
    ),
    (
        ce(ignore_index=1.0),
        TypeError,
        "cross_entropy: ignore_index must be an int, got float.",
    ),
    (
        ce(label_smoothing="some"),
        TypeError,
        "cross_entropy: label_smoothing must be a number, got str.",
    ),
    (
        ce(label_smoothing=1.5),
        ValueError,
        "cross_entropy: label_smoothing is 1.5; it must lie in [0, 1].",
    ),
    (
        ce(z_loss=float("nan")),
        ValueError,
        "cross_entropy: z_loss is nan; it must be finite and not negative.",
    ),
    (
        ce(reduction="average"),
        ValueError,
        "cross_entropy: reduction is 'average'; accepted are 'mean', 'sum' and 'none'.",
    ),
    (
        lce(weight=t(8, 4, dtype=BF16)),
        TypeError,
        "linear_cross_entropy: weight has dtype bfloat16 but hidden has float32; they must match.",
    ),
    (
        lce(weight=t(4, 8)),
        ValueError,
        "linear_cross_entropy: weight has shape (4, 8); hidden has 4 channels, so it must be "
        "(V, 4) with V ≥ 1.",
    ),
    (
        lce(bias=t(4)),
        ValueError,
        "linear_cross_entropy: bias has shape (4,); weight asks for (8,).",
    ),
    (
        lce(target=i(1, 2, 8)),
        ValueError,
        "linear_cross_entropy: target[2] is 8; it must lie in [0, 8) or be ignore_index, -100.",
    ),
    (
        lce(target=i(1, 2, 8, 4)),
        ValueError,
        "linear_cross_entropy: target has shape (4,); hidden has rows (3,); they must match.",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_message(backend, call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_the_defaults_above_are_right(backend):
    ce()(), lce()()


def test_the_kernels_look_at_targets_themselves(kernels):
    """As they must where Python cannot: in a compiled program."""
    ops = torch.ops.fast_transformer
    options = (-100, 0.0, 0.0, 1)
    with pytest.raises(RuntimeError, match="target has 8, which is neither"):
        ops.cross_entropy_fwd(t(3, 8), i(1, 8, 2), *options)
    with pytest.raises(RuntimeError, match="target has -1, which is neither"):
        ops.linear_cross_entropy_fwd(t(3, 4), t(8, 4), None, i(1, -1, 2), *options)


def test_no_second_derivative(cpu):
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
    for call in (lambda: ft.cross_entropy(x, i(1, 2, 3)), lambda: lce(x, w)()):
        (dx,) = torch.autograd.grad(call(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cross_entropy: its fused kernels have no second"):
            dx.sum().backward()


# ---- Modules


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3), (2, 7, 3, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "reduction": "none"}], ids=str)
def test_cross_entropy_loss(options, shape, dtype):
    stock, ours = nn.CrossEntropyLoss(**options), ft.nn.CrossEntropyLoss(**options)
    x = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ())
    got, expected = ours(x, target), stock(x, target)
    assert got.dtype == expected.dtype and isinstance(ours, nn.CrossEntropyLoss)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (got, expected)]
    # torch rounds the softmax and then subtracts
    torch.testing.assert_close(*grads, **({"rtol": 0.02, "atol": 2e-3} if dtype == BF16 else {}))


def test_what_torch_does_is_seen(kernels):
    x, target = torch.randn(3, 7), i(1, 2, 3)
    weighted = ft.nn.CrossEntropyLoss(torch.rand(7))
    with record() as calls:
        loss = weighted(x, target)
        ft.nn.CrossEntropyLoss()(x, x.softmax(-1))
        ft.nn.CrossEntropyLoss()(x, target)
    assert torch.equal(loss, F.cross_entropy(x, target, weighted.weight))
    assert [(c.backend, c.reasons.get("cpu")) for c in calls] == [
        ("reference", "class weights"), ("reference", "probabilities as targets"), ("cpu", None)
    ]  # fmt: skip
    with ft.strict(), pytest.raises(RuntimeError, match="strict mode.*class weights"):
        weighted(x, target)


HAS_NAMESAKE = hasattr(nn, "LinearCrossEntropyLoss")


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(bias, dtype):
    ours = ft.nn.LinearCrossEntropy(5, 9, bias=bias, dtype=dtype, ignore_index=2)
    assert set(ours.state_dict()) == (
        {"linear.weight", "linear.bias"} if bias else {"linear.weight"}
    )
    x, target = torch.randn(4, 5).to(dtype).requires_grad_(), i(1, 2, 8, 0)
    leaves = [x, *ours.parameters()]
    got = ours(x, target)
    expected = F.cross_entropy(ours.linear(x), target, ignore_index=2)
    assert got.dtype == expected.dtype
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == BF16 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    grads = (torch.autograd.grad(loss, leaves) for loss in (got, expected))
    torch.testing.assert_close(*grads, **tolerance)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, target), got)


def test_linear_z_loss_and_rows_of_several_dimensions(backend):
    ours = ft.nn.LinearCrossEntropy(5, 9, z_loss=0.1, reduction="none")
    x, target = torch.randn(2, 3, 5), torch.randint(0, 9, (2, 3))
    logits = ours.linear(x)
    expected = F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")
    torch.testing.assert_close(ours(x, target), expected + 0.1 * logits.logsumexp(-1) ** 2)


@pytest.mark.skipif(not HAS_NAMESAKE, reason="torch before 2.13 has no LinearCrossEntropyLoss")
def test_linear_is_its_namesake(kernels):
    stock = nn.LinearCrossEntropyLoss(5, 9, bias=True)
    ours = ft.nn.LinearCrossEntropy(5, 9, bias=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x, target = torch.randn(4, 5), i(1, 2, 8, 0)
    assert isinstance(ours, nn.LinearCrossEntropyLoss)
    torch.testing.assert_close(ours(x, target), stock(x, target))
    stock.__class__ = ft.nn.LinearCrossEntropy
    assert torch.equal(stock(x, target), ours(x, target))


def test_linear_leaves_class_weights_to_torch(kernels):
    ours = ft.nn.LinearCrossEntropy(5, 9, weight=torch.rand(9))
    x, target = torch.randn(4, 5), i(1, 2, 8, 0)
    with record() as calls:
        loss = ours(x, target)
    assert calls[-1].reasons == {"cpu": "class weights"}
    torch.testing.assert_close(loss, F.cross_entropy(ours.linear(x), target, ours.weight))
    ours.z_loss = 0.1
    with pytest.raises(ValueError, match=r"z_loss is 0.1 with class weights; it must be 0"):
        ours(x, target)


# ---- The compiler


def both(hidden, weight, bias, target):
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "ignore_index": 0}
    whole = ft.cross_entropy(hidden @ weight.T, target, **options)
    each = ft.linear_cross_entropy(hidden, weight, target, bias=bias, reduction="none", **options)
    return whole + each.sum()


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(backend, compiler):
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=compiler)
    for rows in (4, 7):
        inputs = leaf(2, rows, 5), leaf(9, 5), leaf(9)
        target = torch.randint(0, 9, (2, rows))
        got, expected = compiled(*inputs, target), both(*inputs, target)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs)
        )


def operator_calls():
    x, w, b, target = torch.randn(2, 3, 8), torch.randn(7, 8), torch.randn(7), i(1, -100, 2)
    target = target.expand(2, 3).contiguous()
    each = torch.rand(2, 3)
    statistics = torch.rand(6, 2) + 1
    for reduction, grad in ((0, each), (1, each[0, 0].clone()), (2, each[1, 1].clone())):
        options = (-100, 0.1, 0.1, reduction)
        yield "cross_entropy_fwd", (x, target, *options)
        yield "cross_entropy_bwd", (grad, x, target, statistics, *options)
        for bias in (b, None):
            yield "linear_cross_entropy_fwd", (x, w, bias, target, *options)
        inputs = (grad, x, w, b, target, statistics, *options)
        for needed in ((True, True, True), (True, False, False), (False, True, False)):
            yield "linear_cross_entropy_bwd", (*inputs, *needed)


@pytest.mark.parametrize(("name", "arguments"), list(operator_calls()))
def test_opcheck(kernels, name, arguments):
    check_operator(name, arguments)


def test_autocast(backend):
    hidden, weight, target = leaf(4, 8), leaf(9, 8), i(1, 2, 3, 4)
    with torch.autocast("cpu", BF16):
        loss = ft.linear_cross_entropy(hidden, weight, target)
        logits = F.linear(hidden, weight)
        assert loss.dtype == ft.cross_entropy(logits, target).dtype == F32
        assert ft.nn.CrossEntropyLoss()(logits, target).dtype == F32
        assert F.cross_entropy(logits, target).dtype == F32  # what ours follows
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == F32
    low = ft.linear_cross_entropy(hidden.detach().bfloat16(), weight.detach().bfloat16(), target)
    assert torch.equal(low, loss)
