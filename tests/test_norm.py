"""Norms: the definition against PyTorch's, the kernels against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import surrounded
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer import testing
from fast_transformer.reference import philox

NAN = float("nan")
WRT = ("x", "residual", "weight", "bias")


NORMS = ("layer_norm", "rms_norm")
norms = pytest.mark.parametrize("norm", NORMS)


def arguments(*shape, dtype=torch.float32, added=True, scale=1.0, norm="layer_norm"):
    made = {"x": (torch.randn(shape) * scale).to(dtype)}
    if added:
        made["residual"] = (torch.randn(shape) * scale).to(dtype)
    made["weight"] = (1 + torch.randn(shape[-1:])).to(dtype)
    if norm == "layer_norm":
        made["bias"] = torch.randn(shape[-1:]).to(dtype)
    return made


def wrt(inputs):
    return [name for name in WRT if name in inputs]


@pytest.mark.parametrize("affine", [True, False])
def test_reference_is_pytorchs(affine):
    inputs = {n: x.double().requires_grad_() for n, x in arguments(4, 7, added=False).items()}
    x, weight, bias = inputs["x"], *(inputs[n] if affine else None for n in ("weight", "bias"))
    with ft.backend("reference"):
        out = ft.layer_norm(x, weight, bias, 1e-3)
    expected = F.layer_norm(x, (7,), weight, bias, 1e-3)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    leaves = list(inputs.values()) if affine else [x]
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
    )


def assert_rms_norm_is_pytorchs(dtype, affine, eps):
    inputs = arguments(4, 7, dtype=dtype, added=False, norm="rms_norm", scale=1e-3)
    x, weight = (t.requires_grad_() for t in inputs.values())
    out = ft.rms_norm(x, weight if affine else None, eps)
    expected = F.rms_norm(x, (7,), weight if affine else None, eps)
    torch.testing.assert_close(out, expected)
    leaves, cotangent = [x, weight] if affine else [x], torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, cotangent)
    for dx, theirs in zip(found, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        atol = 4 * torch.finfo(dtype).eps * theirs.abs().max().item()
        torch.testing.assert_close(dx, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_rms_norm_is_pytorchs(backend, dtype, affine, eps):
    """By default eps is that of the dtype PyTorch computes in: small inputs tell it from others."""
    assert_rms_norm_is_pytorchs(dtype, affine, eps)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_is_pytorchs_in_float64(affine, eps):
    assert_rms_norm_is_pytorchs(torch.float64, affine, eps)


@norms
def test_reference_add_norm(norm):
    inputs = {n: x.double() for n, x in arguments(4, 16, norm=norm).items()}
    seed = torch.tensor(9)
    keep = philox.keep_mask(seed, 0.25, 1, 1, 4, 16)[0, 0]
    h = inputs["residual"] + inputs["x"] * keep / 0.75
    with ft.backend("reference"):
        out, total = ft.add_norm(**inputs, norm=norm, dropout_p=0.25, seed=seed, return_sum=True)
    torch.testing.assert_close(total, h)
    parameters = [inputs[name] for name in ("weight", "bias") if name in inputs]
    torch.testing.assert_close(out, getattr(F, norm)(h, (16,), *parameters))


@norms
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_reference_gradcheck(dropout_p, norm):
    leaves = [x.double().requires_grad_() for x in arguments(3, 5, norm=norm).values()]
    options = {"norm": norm, "dropout_p": dropout_p, "seed": torch.tensor(2), "return_sum": True}

    def call(*leaves):
        return ft.add_norm(*leaves, **options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("norm", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype), case.wrt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", ["weight", "bias"])
def test_one_parameter_in_float32(cpu, wide, dtype):
    inputs = arguments(5, 70, dtype=dtype)
    inputs[wide] = inputs[wide].float()
    testing.check("add_norm", inputs, wrt(inputs))


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_one_parameter_alone(cpu, missing, dtype):
    inputs = arguments(5, 70, dtype=dtype, added=False)
    del inputs[missing]
    testing.check("layer_norm", inputs, wrt(inputs))


@pytest.mark.parametrize("needed", WRT)
def test_only_what_needs_a_gradient_gets_one(backend, needed):
    inputs = arguments(5, 7)
    inputs[needed].requires_grad_()
    ft.add_norm(**inputs).sum().backward()
    assert [name for name in WRT if inputs[name].grad is not None] == [needed]


def test_gradient_of_the_sum_alone(cpu):
    inputs = {n: x.requires_grad_() for n, x in arguments(5, 7).items()}
    _, total = ft.add_norm(**inputs, return_sum=True)
    weights = torch.randn_like(total)
    total.backward(weights)
    assert torch.equal(inputs["x"].grad, weights) and torch.equal(inputs["residual"].grad, weights)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 77), (40, 130)], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dropout_mask(backend, shape, dropout_p, dtype):
    """With nothing to add to, the sum shows what was kept, bit for bit."""
    seed = torch.tensor(2**40 + 17)
    x = torch.ones(shape, dtype=dtype)
    zeros = torch.zeros_like(x)
    _, total = ft.add_norm(x, zeros, dropout_p=dropout_p, seed=seed, return_sum=True)
    rows = total.numel() // shape[-1]
    keep = philox.keep_mask(seed, dropout_p, 1, 1, rows, shape[-1]).view(shape)
    expected = torch.where(keep, philox.keep_scale(dropout_p), 0.0)
    assert torch.equal(total, expected.to(dtype))


def test_fresh_seeds_follow_torchs_generator(backend):
    x = torch.ones(4, 64)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ft.add_norm(x, x, dropout_p=0.5))
        draws.append(ft.add_norm(x, x, dropout_p=0.5))
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[4])


@norms
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 300.0, 1e10])
def test_magnitudes(cpu, scale, dtype, norm):
    if dtype == torch.float16:
        scale = min(scale, 300.0)
    inputs = arguments(5, 130, dtype=dtype, scale=scale, norm=norm)
    testing.check("add_norm", inputs | {"norm": norm, "return_sum": True}, wrt(inputs))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 70])
def test_without_a_gradient_nothing_else_changes(cpu, width, dtype):
    """Another operator runs then; its bits are the same."""
    inputs = arguments(5, width, dtype=dtype)
    options = {"dropout_p": 0.3, "seed": torch.tensor(3)}
    alone = ft.add_norm(**inputs, **options)
    assert torch.equal(alone, ft.add_norm(**inputs, **options, return_sum=True)[0])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    assert torch.equal(alone, ft.add_norm(**leaves, **options).detach())


@norms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_row_of_nan_keeps_to_itself(cpu, value, norm):
    inputs = {n: x.requires_grad_() for n, x in arguments(6, 70, norm=norm).items()}
    with torch.no_grad():
        inputs["x"][3, 7] = value
    out = ft.add_norm(**inputs, norm=norm)
    others = torch.arange(6) != 3
    assert out[others].isfinite().all() and out[3].isnan().any()
    (dx,) = torch.autograd.grad(out, inputs["x"], torch.randn_like(out))
    assert dx[others].isfinite().all() and dx[3].isnan().any()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_mean_far_from_zero(cpu, dtype):
    """A variance taken as E[x²] − E[x]² would lose everything here."""
    inputs = arguments(5, 130, dtype=torch.float32, added=False)
    inputs = {name: x.to(dtype) for name, x in (inputs | {"x": inputs["x"] + 300}).items()}
    testing.check("layer_norm", inputs, wrt(inputs))


@norms
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1.0])
def test_eps(cpu, eps, norm):
    inputs = arguments(5, 70, norm=norm)
    testing.check("add_norm", inputs | {"norm": norm, "eps": eps}, wrt(inputs))


@norms
@pytest.mark.parametrize(
    "shape", [(0, 8), (3, 0, 8), (8,), (1, 8), (2, 3, 4, 8), (3, 0), (0,)], ids=str
)
def test_leading_dimensions(backend, shape, norm):
    inputs = {n: x.requires_grad_() for n, x in arguments(*shape, norm=norm).items()}
    assert ft.add_norm(**{n: x.detach() for n, x in inputs.items()}, norm=norm).shape == shape
    out, total = ft.add_norm(**inputs, norm=norm, dropout_p=0.1, return_sum=True)
    (out.sum() + total.sum()).backward()
    assert out.shape == total.shape == inputs["x"].grad.shape == shape
    assert all(bool(x.grad.isfinite().all()) for x in inputs.values())


LAYOUTS = {
    "columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one-row-for-all": lambda x: x[:1, :1].expand_as(x),
}


@norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["x", "residual", "both", "parameters"])
def test_strides(cpu, layout, of, norm):
    inputs = arguments(5, 6, 70, norm=norm)
    for name in {"both": ("x", "residual"), "parameters": ()}.get(of, (of,)):
        inputs[name] = LAYOUTS[layout](inputs[name])
    if of == "parameters":
        inputs["weight"] = inputs["weight"].repeat_interleave(3)[::3]
        if norm == "layer_norm":
            inputs["bias"] = inputs["bias"][:1].expand(70)
    testing.check("add_norm", inputs | {"norm": norm, "return_sum": True}, wrt(inputs))


@pytest.mark.smoke
@norms
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 63, 65, 384])
def test_nothing_around_the_inputs_is_read(cpu, width, dtype, norm):
    inputs = arguments(7, width, dtype=dtype, norm=norm)
    options = {"norm": norm, "dropout_p": 0.2, "seed": torch.tensor(4), "return_sum": True}
    expected = testing.evaluate("add_norm", inputs | options, wrt(inputs))
    around = {name: surrounded(x) for name, x in inputs.items()}
    for name, x in testing.evaluate("add_norm", around | options, wrt(inputs)).items():
        assert torch.equal(x, expected[name]), name


def test_outputs_alias_nothing(backend):
    inputs = {n: x.requires_grad_() for n, x in arguments(5, 7).items()}
    out, total = ft.add_norm(**inputs, return_sum=True)
    pointers = [x.data_ptr() for x in (out, total, *inputs.values())]
    assert len(set(pointers)) == len(pointers)


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape(kernels, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    rows, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    norm = data.draw(st.sampled_from(NORMS))
    inputs = arguments(rows, width, dtype=dtype, added=data.draw(st.booleans()), norm=norm)
    for name in [name for name in ("weight", "bias") if name in inputs]:
        kind = data.draw(st.sampled_from(["own", "float32", "none"]))
        inputs[name] = {"own": inputs[name], "float32": inputs[name].float(), "none": None}[kind]
    inputs = {name: x for name, x in inputs.items() if x is not None}
    options, op = {}, norm
    if "residual" in inputs:
        options["norm"], op = norm, "add_norm"
        options["return_sum"] = data.draw(st.booleans())
        options["dropout_p"] = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        options["seed"] = torch.tensor(data.draw(st.integers(0, 2**63 - 1)))
    testing.check(op, inputs | options, wrt(inputs))
