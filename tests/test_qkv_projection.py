"""qkv_projection: the definition against nn.Linear, the kernels against the definition."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import surrounded
from operators import check_operator
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer import testing

NAN = float("nan")
ALL = ("x", "weights", "biases")


def arguments(lead, C, heads, kv_heads, D, dtype=torch.float32):
    rows = (heads + 2 * kv_heads) * D
    made = {
        "x": torch.randn(*lead, C),
        "weights": torch.randn(rows, C) * C**-0.5,
        "biases": torch.randn(rows),
    }
    return {n: x.to(dtype) for n, x in made.items()} | {"heads": heads, "kv_heads": kv_heads}


def in_three(inputs):
    heads, kv_heads = inputs["heads"], inputs["kv_heads"]
    D = inputs["weights"].shape[0] // (heads + 2 * kv_heads)
    sizes = (heads * D, kv_heads * D, kv_heads * D)
    weights, biases = (tuple(inputs[n].detach().split(sizes)) for n in ("weights", "biases"))
    return inputs | {"weights": weights, "biases": biases}


def test_reference_is_linear(backend):
    inputs = arguments((2, 5), 6, 4, 2, 3)
    three = in_three(inputs)
    made = ft.qkv_projection(**three)
    shapes = [(2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3)]
    assert [x.shape for x in made] == shapes
    for y, w, b in zip(made, three["weights"], three["biases"], strict=True):
        expected = F.linear(inputs["x"], w, b)
        torch.testing.assert_close(y.transpose(1, 2).flatten(2), expected)
    packed = ft.qkv_projection(**inputs | {"x": inputs["x"][0]})
    assert [x.shape for x in packed] == [(5, 4, 3), (5, 2, 3), (5, 2, 3)]
    for y, z in zip(packed, made, strict=True):
        torch.testing.assert_close(y, z[0].transpose(0, 1))
    plain = ft.qkv_projection(inputs["x"], three["weights"], (None,) * 3, heads=4, kv_heads=2)
    torch.testing.assert_close(
        plain[1].transpose(1, 2).flatten(2), F.linear(inputs["x"], three["weights"][1])
    )


def test_reference_gradcheck():
    inputs = arguments((2, 3), 4, 2, 1, 2, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ALL]

    def call(x, weights, biases):
        return ft.qkv_projection(x, weights, biases, heads=2, kv_heads=1)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_self_attention_is_torchs(cpu):
    module = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    torch.nn.init.normal_(module.in_proj_bias)
    x = torch.randn(2, 7, 24)
    q, k, v = ft.qkv_projection(x, module.in_proj_weight, module.in_proj_bias, heads=3)
    out = module.out_proj(ft.attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, module(x, x, x, need_weights=False)[0])


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [((3, 65), 70, 4, 2, 16), ((37,), 40, 3, 3, 30)], ids=str)
def test_three_weights_are_one(cpu, shape, dtype):
    """Bit for bit, in both passes; and every gradient is on its own memory."""
    inputs = arguments(*shape, dtype)
    three = in_three(inputs)
    leaves = [inputs[n].requires_grad_() for n in ALL]
    x = inputs["x"].detach().requires_grad_()
    parts = [p.clone().requires_grad_() for n in ("weights", "biases") for p in three[n]]
    one = ft.qkv_projection(**inputs)
    other = ft.qkv_projection(**three | {"x": x, "weights": parts[:3], "biases": parts[3:]})
    for y, z in zip(one, other, strict=True):
        assert torch.equal(y, z)
    weights = [torch.randn(y.shape).to(dtype) for y in one]
    dx, dw, db = torch.autograd.grad(one, leaves, weights)
    grads = torch.autograd.grad(other, [x, *parts], weights)
    assert torch.equal(grads[0], dx)
    assert torch.equal(torch.cat(grads[1:4]), dw) and torch.equal(torch.cat(grads[4:]), db)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 7


@pytest.mark.parametrize("needed", ALL)
def test_only_what_needs_a_gradient_gets_one(cpu, needed):
    inputs = arguments((2, 5), 7, 2, 1, 9)
    testing.check("qkv_projection", inputs, (needed,))
    inputs[needed].requires_grad_()
    torch.cat([x.flatten() for x in ft.qkv_projection(**inputs)]).sum().backward()
    assert [name for name in ALL if inputs[name].grad is not None] == [needed]


def test_one_weight_of_three_needs_a_gradient(cpu):
    inputs = in_three(arguments((2, 5), 7, 2, 1, 9))
    inputs["weights"][1].requires_grad_()
    _, key, _ = ft.qkv_projection(**inputs)
    key.sum().backward()
    expected = inputs["x"].sum((0, 1)).expand(9, -1)
    torch.testing.assert_close(inputs["weights"][1].grad, expected)


LAYOUTS = {
    "columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "length-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one-row-for-all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["x", "weights"])
def test_strides(cpu, layout, of, dtype):
    inputs = arguments((3, 37), 40, 3, 3, 10, dtype)
    inputs[of] = LAYOUTS[layout](inputs[of])
    testing.check("qkv_projection", inputs, ALL)


def test_length_first_is_not_copied(cpu):
    """The layout of nn.MultiheadAttention, (length, batch, C), gives views of that order."""
    inputs = arguments((37, 3), 40, 3, 3, 10)
    made = ft.qkv_projection(**inputs | {"x": inputs["x"].transpose(0, 1)})
    for x in made:
        assert x.shape == (3, 3, 37, 10) and x.permute(2, 0, 1, 3).is_contiguous()


@pytest.mark.parametrize("lead", [(0, 3), (2, 0), (0,), (1, 1)], ids=str)
def test_empty_and_single(backend, lead):
    inputs = arguments(lead, 8, 2, 1, 4)
    leaves = [inputs[n].requires_grad_() for n in ALL]
    made = ft.qkv_projection(**inputs)
    for x in torch.autograd.grad(made, leaves, [torch.ones_like(x) for x in made]):
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 30.0, 1e8])
def test_magnitudes(cpu, scale, dtype):
    if dtype == torch.float16:
        scale = min(scale, 30.0)
    inputs = arguments((2, 9), 33, 2, 1, 20, dtype)
    inputs["x"] = (torch.randn(2, 9, 33) * scale).to(dtype)
    testing.check("qkv_projection", inputs, ALL)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_nothing_around_the_inputs_is_read(cpu, dtype):
    inputs = arguments((63,), 65, 3, 1, 17, dtype)
    expected = testing.evaluate("qkv_projection", inputs, ALL)
    around = inputs | {name: surrounded(inputs[name]) for name in ALL}
    for name, x in testing.evaluate("qkv_projection", around, ALL).items():
        assert torch.equal(x, expected[name]), name


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape(kernels, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    B, T, C, D = (data.draw(st.integers(1, n)) for n in (4, 70, 140, 70))
    kv_heads = data.draw(st.integers(1, 3))
    lead = (B, T) if data.draw(st.booleans()) else (T,)
    inputs = arguments(lead, C, kv_heads * data.draw(st.integers(1, 3)), kv_heads, D, dtype)
    if data.draw(st.booleans()):
        inputs["biases"] = None
    wrt = [name for name in ALL if inputs[name] is not None and data.draw(st.booleans())]
    testing.check("qkv_projection", inputs, wrt)


def test_double_backward_raises(cpu):
    inputs = arguments((2, 3), 4, 2, 1, 2)
    x = inputs["x"].requires_grad_()
    q, _, _ = ft.qkv_projection(**inputs)
    (dx,) = torch.autograd.grad(q.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="qkv_projection: its fused kernels have no second"):
        dx.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_compiled(cpu, packed, dynamic):
    torch._dynamo.reset()

    def step(x, weights, biases):
        q, k, v = ft.qkv_projection(x, weights, biases, heads=4, kv_heads=2)
        return ft.attention(q, k, v)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for T in (3, 5):
        inputs = arguments((2, T), 8, 4, 2, 6)
        inputs = inputs if packed else in_three(inputs)
        given = [inputs[n] for n in ALL]
        leaves = [x.requires_grad_() for n in given for x in (n if isinstance(n, tuple) else (n,))]
        for x, y in zip(
            torch.autograd.grad(compiled(*given).sum(), leaves),
            torch.autograd.grad(step(*given).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


def operator_calls():
    inputs = arguments((2, 5), 8, 4, 2, 3)
    x, weight, bias = (inputs[n] for n in ALL)
    three = in_three(inputs)
    none = (None, None)
    yield "qkv_projection_fwd", (x, weight, *none, bias, *none, 4, 2)
    yield "qkv_projection_fwd", (x[0], weight, *none, None, *none, 4, 2)
    yield "qkv_projection_fwd", (x, *three["weights"], *three["biases"], 4, 2)
    grads = tuple(torch.randn(2, 5, heads, 3) for heads in (4, 2, 2))
    flags = (True, False, False, True, False, False)
    yield "qkv_projection_bwd", (*grads, x, weight, *none, True, *flags)
    flags = (True, False, True, False, True, True)
    yield "qkv_projection_bwd", (*grads, x, *three["weights"], False, *flags)


@pytest.mark.parametrize(("name", "arguments"), list(operator_calls()))
def test_opcheck(kernels, name, arguments):
    check_operator(name, arguments)


def test_autocast(cpu):
    with torch.autocast("cpu", torch.bfloat16):
        made = ft.qkv_projection(**in_three(arguments((2, 3), 4, 2, 1, 2)))
    assert all(x.dtype == torch.bfloat16 for x in made)


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def call(x=None, weights=None, biases=None, heads=2, kv_heads=None):
    x, weights = t(2, 3, 8) if x is None else x, t(24, 8) if weights is None else weights
    return lambda: ft.qkv_projection(x, weights, biases, heads=heads, kv_heads=kv_heads)


THREE = (t(8, 8), t(4, 8), t(4, 8))
ERRORS = [
    (call([1.0]), TypeError, "x must be a tensor, got list."),
    (
        call(t(8)),
        ValueError,
        "x has shape (8,); it must be (batch, length, C) or (tokens, C).",
    ),
    (call(heads=2.0), TypeError, "heads must be an integer, got float."),
    (call(kv_heads=0), ValueError, "kv_heads is 0; it must be at least 1."),
    (
        call(weights=(t(8, 8), t(8, 8))),
        TypeError,
        "weights must be three tensors, of query, key and value, or one that holds them all, got "
        "2 of them.",
    ),
    (
        call(biases=(None, None, None)),
        TypeError,
        "biases must be a tensor or None where weights is one tensor, got tuple.",
    ),
    (
        call(weights=THREE, biases=t(16), kv_heads=1),
        TypeError,
        "biases must be three tensors, of query, key and value, or one that holds them all, got "
        "Tensor.",
    ),
    (
        call(weights=t(24, 9)),
        ValueError,
        "weights has shape (24, 9); x has 8 features, so it must be (out, 8).",
    ),
    (
        call(weights=t(25, 8)),
        ValueError,
        "weights gives 25 features, which 6 heads (heads + 2 kv_heads) do not divide.",
    ),
    (
        call(weights=(t(8, 8), t(4, 8), t(4, 8, dtype=torch.float64)), kv_heads=1),
        TypeError,
        "weights[2] (value) has dtype float64 but x has float32; they must match.",
    ),
    (
        call(weights=THREE, kv_heads=2),
        ValueError,
        "weights[1] (key) gives 4 features; 2 heads of query's head_dim 4 have 8.",
    ),
    (
        call(biases=t(8)),
        ValueError,
        "biases has shape (8,); its weight asks for (24,).",
    ),
    (
        call(weights=THREE, biases=(None, t(8), None), kv_heads=1),
        ValueError,
        "biases[1] (key) has shape (8,); its weight asks for (4,).",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_message(call, error, message):
    with pytest.raises(error, match=f"^{re.escape('qkv_projection: ' + message)}$"):
        call()


def test_the_defaults_above_are_right():
    """Else the rows above would prove nothing."""
    call()()
    call(weights=THREE, kv_heads=1)()
