"""linear_act and mlp: the definition against PyTorch's, the kernels against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, surrounded
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer import testing
from fast_transformer.reference import philox

NAN = float("nan")
ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu", "silu"]
LINEAR = ("x", "weight", "bias")
MLP = ("x", "w1", "b1", "w2", "b2")


def linear_arguments(M, K, N, dtype=torch.float32):
    made = {"x": torch.randn(M, K), "weight": torch.randn(N, K) * K**-0.5, "bias": torch.randn(N)}
    return {name: x.to(dtype) for name, x in made.items()}


def mlp_arguments(M, C, F, N, dtype=torch.float32):
    w1, w2 = torch.randn(F, C) * C**-0.5, torch.randn(N, F) * F**-0.5
    made = {"x": torch.randn(M, C), "w1": w1, "b1": torch.randn(F), "w2": w2, "b2": torch.randn(N)}
    return {name: x.to(dtype) for name, x in made.items()}


THEIRS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_pytorchs(activation):
    x, w1, b1, w2, b2 = (x.double() for x in mlp_arguments(5, 7, 11, 3).values())
    hidden = THEIRS[activation](x @ w1.T + b1)
    with ft.backend("reference"):
        torch.testing.assert_close(ft.linear_act(x, w1, b1, activation=activation), hidden)
        out = ft.mlp(x, w1, b1, w2, b2, activation=activation)
        torch.testing.assert_close(out, hidden @ w2.T + b2)
        seed = torch.tensor(6)
        out = ft.mlp(x, w1, b1, w2, None, activation=activation, dropout_p=0.25, seed=seed)
        keep = philox.keep_mask(seed, 0.25, 1, 1, 5, 11)[0, 0]
        torch.testing.assert_close(out, (hidden * keep / 0.75) @ w2.T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradcheck(activation):
    leaves = [x.double().requires_grad_() for x in mlp_arguments(2, 3, 4, 2).values()]

    def call(*leaves):
        options = {"dropout_p": 0.2, "seed": torch.tensor(2)}
        return ft.mlp(*leaves, activation=activation, **options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("mlp", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype), case.wrt)


@pytest.mark.parametrize("needed", LINEAR)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_only_what_needs_a_gradient_gets_one(backend, needed, activation):
    inputs = linear_arguments(5, 7, 9)
    inputs[needed].requires_grad_()
    ft.linear_act(**inputs, activation=activation).sum().backward()
    assert [name for name in LINEAR if inputs[name].grad is not None] == [needed]


@pytest.mark.parametrize("needed", MLP)
def test_only_what_needs_a_gradient_gets_one_in_mlp(cpu, needed):
    inputs = mlp_arguments(5, 7, 9, 4)
    testing.check("mlp", inputs, (needed,))
    inputs[needed].requires_grad_()
    ft.mlp(**inputs).sum().backward()
    assert [name for name in MLP if inputs[name].grad is not None] == [needed]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 77), (40, 130)], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dropout_mask(backend, shape, dropout_p, dtype):
    """Between two unit matrices, the output shows what was kept, bit for bit."""
    seed, eye = torch.tensor(2**40 + 17), torch.eye(shape[-1], dtype=dtype)
    x = torch.ones(shape, dtype=dtype)
    out = ft.mlp(x, eye, None, eye, None, activation="relu", dropout_p=dropout_p, seed=seed)
    rows = out.numel() // shape[-1]
    keep = philox.keep_mask(seed, dropout_p, 1, 1, rows, shape[-1]).view(shape)
    assert torch.equal(out, torch.where(keep, philox.keep_scale(dropout_p), 0.0).to(dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_everywhere(cpu, activation, dtype):
    """The activation and its derivative alone, from the deepest tail to the largest input."""
    largest = 200.0 if dtype == torch.float16 else 1e15
    ends = torch.tensor([-largest, -88.0, -87.0, -0.0, 0.0, 87.0, 88.0, 89.0, largest])
    x = torch.cat([torch.linspace(-14, 14, 701), ends, torch.tensor([1e-30, -1e-30, 1e-5])])
    inputs = {"x": x.to(dtype)[:, None], "weight": torch.ones(1, 1, dtype=dtype)}
    for part in (slice(0, 701), slice(701, 706), slice(706, 709), slice(709, None)):
        piece = inputs | {"x": inputs["x"][part], "activation": activation}
        testing.check("linear_act", piece, ("x",))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 30.0, 1e8])
def test_magnitudes(cpu, scale, dtype):
    if dtype == torch.float16:
        scale = min(scale, 30.0)
    inputs = mlp_arguments(5, 33, 70, 20, dtype=dtype)
    inputs["x"] = (torch.randn(5, 33) * scale).to(dtype)
    testing.check("mlp", inputs, MLP)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 0), (2, 3), (2, 3, 4)], ids=str)
def test_leading_dimensions(backend, lead):
    inputs = {n: x.requires_grad_() for n, x in mlp_arguments(1, 8, 16, 4).items()}
    inputs["x"] = torch.randn(*lead, 8, requires_grad=True)
    out = ft.mlp(**inputs)
    out.sum().backward()
    assert out.shape == (*lead, 4) and inputs["x"].grad.shape == (*lead, 8)
    assert all(bool(x.grad.isfinite().all()) for x in inputs.values())
    assert ft.linear_act(inputs["x"], inputs["w1"]).shape == (*lead, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", MLP)
def test_strides(cpu, layout, of):
    inputs = mlp_arguments(37, 40, 70, 20)
    if inputs[of].dim() == 1:
        inputs[of] = inputs[of].repeat_interleave(2)[::2]
    else:
        inputs[of] = LAYOUTS[layout](inputs[of])
    testing.check("mlp", inputs, MLP)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "transposed"])
def test_strides_of_three_dimensions(cpu, layout):
    inputs = linear_arguments(1, 40, 30)
    inputs["x"] = LAYOUTS[layout](torch.randn(5, 6, 40))
    testing.check("linear_act", inputs, LINEAR)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 63, 65, 17), (70, 33, 130, 67)], ids=str)
def test_nothing_around_the_inputs_is_read(cpu, shape, dtype):
    inputs = mlp_arguments(*shape, dtype=dtype)
    options = {"dropout_p": 0.2, "seed": torch.tensor(4)}
    expected = testing.evaluate("mlp", inputs | options, MLP)
    around = {name: surrounded(x) for name, x in inputs.items()}
    for name, x in testing.evaluate("mlp", around | options, MLP).items():
        assert torch.equal(x, expected[name]), name


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape(kernels, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    M, C, F, N = (data.draw(st.integers(1, 140)) for _ in range(4))
    inputs = mlp_arguments(M, C, F, N, dtype=dtype)
    for name in ("b1", "b2"):
        if data.draw(st.booleans()):
            inputs[name] = None
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS))}
    options["dropout_p"] = data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]))
    options["seed"] = torch.tensor(data.draw(st.integers(0, 2**63 - 1)))
    wrt = [name for name in MLP if inputs[name] is not None and data.draw(st.booleans())]
    testing.check("mlp", inputs | options, wrt)
