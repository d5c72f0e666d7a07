"""Rotary: the definition against what models do, the kernel against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import surrounded

import fast_transformer as ft
from fast_transformer import testing

NAN = float("nan")
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def tables(length, pairs, *batch, dtype=F32):
    angles = torch.randn(*batch, length, pairs, dtype=F64)
    return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def arguments(B=2, H=4, KV=2, T=5, D=12, R=None, dtype=F32, **options):
    made = {"query": torch.randn(B, H, T, D).to(dtype), "key": torch.randn(B, KV, T, D).to(dtype)}
    return made | tables(T, (D if R is None else R) // 2) | options


@pytest.mark.parametrize("rotated", [12, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_multiplies_complex_numbers(interleaved, rotated):
    inputs = testing.in_float64(arguments(R=rotated))
    x = inputs["query"][..., :rotated]
    split = (rotated // 2, 2) if interleaved else (2, rotated // 2)
    pairs = x.unflatten(-1, split) if interleaved else x.unflatten(-1, split).mT
    numbers = torch.view_as_complex(pairs.contiguous())
    turned = torch.view_as_real(numbers * torch.complex(inputs["cos"], inputs["sin"]))
    turned = (turned if interleaved else turned.mT).flatten(-2)
    expected = torch.cat((turned, inputs["query"][..., rotated:]), -1)
    with ft.backend("reference"):
        out, _ = ft.rotary(**inputs, interleaved=interleaved)
    torch.testing.assert_close(out, expected)


def test_halves_are_llamas(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    inputs = arguments(B=2, H=4, KV=2, T=9, D=32) | tables(9, 16, 2)
    cos, sin = (torch.cat((inputs[name],) * 2, -1) for name in ("cos", "sin"))
    expected = llama.apply_rotary_pos_emb(inputs["query"], inputs["key"], cos, sin)
    torch.testing.assert_close(ft.rotary(**inputs), expected)


def test_interleaved_is_gptjs(backend):
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    inputs = arguments(B=2, H=4, KV=2, T=9, D=32) | tables(9, 16, 2)
    cos, sin = inputs["cos"], inputs["sin"]
    expected = (  # which has the heads behind the positions
        gptj.apply_rotary_pos_emb(inputs[name].transpose(1, 2), sin, cos).transpose(1, 2)
        for name in ("query", "key")
    )
    torch.testing.assert_close(ft.rotary(**inputs, interleaved=True), tuple(expected))


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradcheck(interleaved):
    inputs = testing.in_float64(arguments(T=3, D=6, R=4))
    leaves = inputs["query"].requires_grad_(), inputs["key"].requires_grad_()

    def call(query, key):
        return ft.rotary(query, key, inputs["cos"], inputs["sin"], interleaved=interleaved)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("rotary", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype), case.wrt)


def test_scores_depend_on_distance_alone(backend):
    """What it is for: ⟨turned query at m, turned key at n⟩ depends on m − n."""
    angles = torch.arange(40)[:, None] * 100.0 ** (-torch.arange(8) / 8)
    query, key = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 40, 16).unbind()
    query, key = ft.rotary(query, key, angles.cos(), angles.sin())
    scores = (query @ key.mT)[0, 0]
    for distance in (-7, 0, 13):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_turned_back_is_the_input(backend, interleaved, dtype):
    inputs = arguments(dtype=dtype, T=33, D=40, R=30, interleaved=interleaved)
    query, key = ft.rotary(**inputs)
    sin = -inputs.pop("sin")
    back = ft.rotary(**inputs | {"query": query, "key": key}, sin=sin)
    for x, name in zip(back, ("query", "key"), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x, inputs[name], atol=8 * eps, rtol=8 * eps)
        assert torch.equal(x[..., 30:], inputs[name][..., 30:])


def test_without_a_key(backend):
    inputs = arguments()
    alone = ft.rotary(**inputs | {"key": None})
    assert torch.equal(alone, ft.rotary(**inputs)[0])


@pytest.mark.parametrize("needed", ["query", "key"])
def test_only_what_needs_a_gradient_gets_one(backend, needed):
    inputs = arguments()
    inputs[needed].requires_grad_()
    query, key = ft.rotary(**inputs)
    (query.sum() + key.sum()).backward()
    assert [name for name in ("query", "key") if inputs[name].grad is not None] == [needed]


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_result_alone(cpu, used):
    inputs = arguments()
    leaves = [inputs[name].requires_grad_() for name in ("query", "key")]
    out = ft.rotary(**inputs)[used]
    weights = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, weights, allow_unused=True)
    expected = ft.rotary(weights, None, inputs["cos"], -inputs["sin"])
    assert torch.equal(grads[used], expected)
    assert grads[1 - used] is None or not grads[1 - used].any()


@pytest.mark.parametrize("key", [True, False])
def test_second_derivatives(cpu, key):
    """The gradient is a rotation too, and so is its gradient."""
    inputs = arguments()
    query, other = inputs["query"].requires_grad_(), inputs["key"].requires_grad_()

    def call():
        out = ft.rotary(query, other if key else None, inputs["cos"], inputs["sin"])
        x = out[0].sin().sum() + out[1].cos().sum() if key else out.sin().sum()
        leaves = [query, other] if key else [query]
        first = torch.autograd.grad(x, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found = call()
    with ft.backend("reference"):
        torch.testing.assert_close(found, call())


LAYOUTS = {
    "every-second-row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "heads-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "length-first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "of-one-projection": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "one-head-for-all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["query", "key", "both", "tables"])
def test_strides(cpu, layout, of):
    inputs = arguments(T=6, D=40)
    inputs |= tables(6, 20, 2)
    for name in {"both": ("query", "key"), "tables": ("cos", "sin")}.get(of, (of,)):
        if of != "tables":
            inputs[name] = LAYOUTS[layout](inputs[name])
        else:
            inputs[name] = LAYOUTS[layout](inputs[name][:, None].expand(-1, 3, -1, -1))[:, 0]
    testing.check("rotary", inputs, ("query", "key"))


def test_results_lie_as_the_inputs_do(backend):
    x = torch.randn(2, 5, 3, 8)
    sequence_first = torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3)
    for inner in (x.transpose(1, 2), x.transpose(1, 2).contiguous(), sequence_first):
        query, key = ft.rotary(inner, inner[:, :2], **tables(5, 4))
        assert query.stride() == inner.stride()
        assert key.stride() == torch.empty_like(inner[:, :2]).stride()
        assert query.data_ptr() != inner.data_ptr()


def test_packed_is_a_batch_of_one(backend):
    inputs = arguments(B=1, T=7)
    expected = ft.rotary(**inputs)
    packed = {n: inputs[n][0].transpose(0, 1).contiguous() for n in ("query", "key")}
    found = ft.rotary(**inputs | packed)
    for x, y in zip(found, expected, strict=True):
        assert x.is_contiguous() and torch.equal(x, y[0].transpose(0, 1))
    assert torch.equal(ft.rotary(**inputs | packed | {"key": None}), found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_in_the_inputs_dtype(cpu, dtype):
    inputs = arguments(dtype=dtype, T=33, D=40)
    inputs |= {name: inputs[name].to(dtype) for name in ("cos", "sin")}
    testing.check("rotary", inputs, ("query", "key"))


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 8), (2, 2, 1, 0, 8), (1, 0, 0, 3, 8)], ids=str)
def test_empty(backend, shape):
    B, H, KV, T, D = shape
    inputs = arguments(B, H, KV, T, D)
    leaves = [inputs[name].requires_grad_() for name in ("query", "key")]
    query, key = ft.rotary(**inputs)
    (query.sum() + key.sum()).backward()
    assert query.shape == leaves[0].grad.shape and key.shape == leaves[1].grad.shape


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 300.0, 1e30])
def test_magnitudes(cpu, scale, dtype):
    inputs = arguments(T=9, D=40)
    scale = min(scale, 300.0) if dtype == torch.float16 else scale
    inputs |= {name: (inputs[name] * scale).to(dtype) for name in ("query", "key")}
    testing.check("rotary", inputs, ("query", "key"))


@pytest.mark.smoke
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(("width", "rotated"), [(2, 2), (63, 42), (65, 64), (80, 20)])
def test_nothing_around_the_inputs_is_read(cpu, width, rotated, interleaved, dtype):
    inputs = arguments(T=7, D=width, R=rotated, dtype=dtype)
    options = {"interleaved": interleaved}
    expected = testing.evaluate("rotary", inputs | options, ("query", "key"))
    around = {name: surrounded(x) for name, x in inputs.items()}
    for name, x in testing.evaluate("rotary", around | options, ("query", "key")).items():
        assert torch.equal(x, expected[name]), name


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape(kernels, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    size = st.integers(1, 5)
    B, H, KV = (data.draw(size) for _ in range(3))
    T, D = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 140))
    pairs = data.draw(st.integers(0, D // 2))
    own = dtype if data.draw(st.booleans()) else F32
    inputs = arguments(B, H, KV, T, D, dtype=dtype, interleaved=data.draw(st.booleans()))
    inputs |= tables(T, pairs, *([B] if data.draw(st.booleans()) else []), dtype=own)
    if data.draw(st.booleans()):
        inputs["query"] = LAYOUTS["heads-last"](inputs["query"])
    if data.draw(st.booleans()):
        inputs["key"] = None
    wrt = ("query",) if inputs["key"] is None else ("query", "key")
    testing.check("rotary", inputs, wrt)
