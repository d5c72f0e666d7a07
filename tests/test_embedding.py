"""embedding_norm: the definition against PyTorch's modules, the kernels against the definition."""

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
WRT = ("word", "position", "token_type", "weight", "bias")


def arguments(B=3, T=5, V=11, C=12, *, positions=9, types=3, dtype=torch.float32, **options):
    made = {"input_ids": torch.randint(0, V, (B, T)), "word": torch.randn(V, C)}
    made |= {"position": torch.randn(positions, C), "token_type": torch.randn(types, C)}
    made |= {"weight": 1 + torch.randn(C), "bias": torch.randn(C)}
    made = {n: x.to(dtype) if x.is_floating_point() else x for n, x in made.items()}
    return made | {"token_type_ids": torch.randint(0, types, (B, T))} | options


def test_reference_is_pytorchs():
    inputs = testing.in_float64(arguments(padding_idx=2))
    leaves = {name: inputs[name].requires_grad_() for name in WRT}
    word, position, token_type, weight, bias = leaves.values()
    with ft.backend("reference"):
        out = ft.embedding_norm(**inputs, eps=1e-3)
    h = F.embedding(inputs["input_ids"], word, padding_idx=2) + position[:5]
    h = h + F.embedding(inputs["token_type_ids"], token_type)
    expected = F.layer_norm(h, (12,), weight, bias, 1e-3)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, list(leaves.values()), cotangent),
        torch.autograd.grad(expected, list(leaves.values()), cotangent),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_reference_gradcheck(dropout_p):
    inputs = testing.in_float64(arguments(2, 3, 5, 4, positions=3, types=2))
    leaves = [inputs[name].requires_grad_() for name in WRT]

    def call(*leaves):
        seed = torch.tensor(2)
        given = inputs | dict(zip(WRT, leaves, strict=True))
        return ft.embedding_norm(**given, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("embedding", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype), case.wrt)


@pytest.mark.parametrize("dropout_p", [0.1, 0.999, 1.0])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dropout_follows_the_norm(backend, dropout_p, dtype):
    """With a weight of zeros and a bias of ones the result shows what was kept."""
    inputs = arguments(C=77, dtype=dtype, dropout_p=dropout_p, seed=torch.tensor(2**40 + 17))
    inputs |= {"weight": torch.zeros(77, dtype=dtype), "bias": torch.ones(77, dtype=dtype)}
    out = ft.embedding_norm(**inputs)
    keep = philox.keep_mask(inputs["seed"], dropout_p, 1, 1, 15, 77).view(out.shape)
    expected = torch.where(keep, philox.keep_scale(dropout_p), 0.0)
    assert torch.equal(out, expected.to(dtype))


def test_fresh_seeds_follow_torchs_generator(backend):
    inputs, draws = arguments(C=64, dropout_p=0.5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ft.embedding_norm(**inputs))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("needed", WRT)
def test_only_what_needs_a_gradient_gets_one(backend, needed):
    inputs = arguments()
    inputs[needed].requires_grad_()
    ft.embedding_norm(**inputs).sum().backward()
    assert [name for name in WRT if inputs[name].grad is not None] == [needed]


def test_padding_rows_get_no_gradient(backend):
    inputs = arguments(B=40, V=4, padding_idx=2, position_padding_idx=1)
    leaves = [inputs[name].requires_grad_() for name in WRT]
    out = ft.embedding_norm(**inputs)
    dword, dposition, *_ = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert not dword[2].any() and dword[[0, 1, 3]].any(-1).all()
    assert not dposition[1].any() and not dposition[5:].any() and dposition[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (3, 1)], ids=str)
def test_ids_broadcast(cpu, shape, dtype):
    inputs = arguments()
    inputs["input_ids"] = inputs["input_ids"].to(dtype)
    inputs["position_ids"] = torch.randint(0, 9, shape, dtype=dtype)
    inputs["token_type_ids"] = torch.randint(0, 3, shape, dtype=dtype)
    testing.check("embedding_norm", inputs, WRT)


def test_packed_is_a_batch_of_one(backend):
    inputs = arguments(B=1, T=7)
    expected = ft.embedding_norm(**inputs)
    packed = {name: inputs[name][0] for name in ("input_ids", "token_type_ids")}
    assert torch.equal(ft.embedding_norm(**inputs | packed), expected[0])


def test_defaults_are_positions_in_order_and_type_zero(backend):
    inputs = arguments()
    del inputs["token_type_ids"]
    given = {"position_ids": torch.arange(5), "token_type_ids": torch.zeros(5, dtype=torch.long)}
    assert torch.equal(ft.embedding_norm(**inputs), ft.embedding_norm(**inputs | given))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 300.0, 1e10])
def test_magnitudes(cpu, scale, dtype):
    inputs = arguments(C=70)
    scale = min(scale, 300.0) if dtype == torch.float16 else scale
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    inputs |= {name: inputs[name] * scale for name in WRT[:3]}
    # of equal rows the gradient is 1 / √eps, which float16 must hold
    testing.check("embedding_norm", inputs | {"eps": 1e-5}, WRT)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 3, 4)], ids=str)
def test_leading_dimensions(backend, shape):
    inputs = arguments(dropout_p=0.1, token_type_ids=None)
    leaves = [inputs[name].requires_grad_() for name in WRT]
    out = ft.embedding_norm(**inputs | {"input_ids": torch.randint(0, 11, shape)})
    grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (*shape, 12)
    assert all(bool(g.isfinite().all()) for g in grads)
    if out.numel() == 0:
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("layout", ["columns", "every-second-column", "every-second-row"])
def test_strides(cpu, layout):
    layouts = {
        "columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    }
    inputs = arguments(C=70)
    made = {name: layouts[layout](inputs[name]) for name in (*WRT, "input_ids")}
    testing.check("embedding_norm", inputs | made, WRT)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 63, 65, 384])
def test_nothing_around_the_inputs_is_read(cpu, width, dtype):
    inputs = arguments(C=width, dtype=dtype, dropout_p=0.2, seed=torch.tensor(4))
    expected = testing.evaluate("embedding_norm", inputs, WRT)
    around = inputs | {name: surrounded(inputs[name]) for name in WRT}
    for name, x in testing.evaluate("embedding_norm", around, WRT).items():
        assert torch.equal(x, expected[name]), name


def test_rows_that_nobody_chose_are_not_read(cpu):
    inputs = arguments(V=50)
    chosen = torch.zeros(50, dtype=torch.bool)
    chosen[inputs["input_ids"]] = True
    inputs["word"][~chosen] = NAN
    results = testing.evaluate("embedding_norm", inputs, WRT)
    assert all(bool(x.isfinite().all()) for x in results.values())
    assert not results["dword"][~chosen].any()


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape(kernels, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    B, T = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40))
    V, C = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 200))
    types = data.draw(st.integers(1, 4))
    inputs = arguments(B, T, V, C, positions=T, types=types, dtype=dtype)
    if data.draw(st.booleans()):
        inputs["padding_idx"] = data.draw(st.integers(0, V - 1))
    if data.draw(st.booleans()):
        inputs |= {"position": None}
    if data.draw(st.booleans()):
        inputs |= {"token_type": None, "token_type_ids": None}
    for name in ("weight", "bias"):
        kind = data.draw(st.sampled_from(["own", "float32", "none"]))
        inputs[name] = {"own": inputs[name], "float32": inputs[name].float(), "none": None}[kind]
    inputs["dropout_p"] = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    inputs["seed"] = torch.tensor(data.draw(st.integers(0, 2**63 - 1)))
    testing.check("embedding_norm", inputs, [n for n in WRT if inputs[n] is not None])
