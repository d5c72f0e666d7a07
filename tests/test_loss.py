"""Losses: the definition against PyTorch's, the kernels against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, surrounded
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer import testing

NAN = float("nan")
LINEAR = ("hidden", "weight", "bias")
OPTIONS = [
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.3}, {"ignore_index": 2}
]  # fmt: skip


def arguments(M, V, dtype=torch.float32, scale=1.0):
    logits = (torch.randn(M, V) * scale).to(dtype)
    return {"logits": logits, "target": torch.randint(0, V, (M,))}


def linear_arguments(M, C, V, dtype=torch.float32):
    made = {"hidden": torch.randn(M, C), "weight": torch.randn(V, C), "bias": torch.randn(V)}
    made = {name: x.to(dtype) for name, x in made.items()}
    return {**made, "target": torch.randint(0, V, (M,))}


def with_gradients(out, leaves):
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).add(2).view(out.shape)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_is_pytorchs(options):
    inputs = arguments(9, 5, torch.float64)
    logits, target = inputs["logits"].requires_grad_(), inputs["target"]
    with ft.backend("reference"):
        got = with_gradients(ft.cross_entropy(logits, target, **options), [logits])
    torch.testing.assert_close(
        got, with_gradients(F.cross_entropy(logits, target, **options), [logits])
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_reference_is_pytorchs(options):
    inputs = linear_arguments(9, 4, 5, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in LINEAR]
    with ft.backend("reference"):
        got = with_gradients(ft.linear_cross_entropy(**inputs, **options), leaves)
    logits = F.linear(*leaves)
    expected = F.cross_entropy(logits, inputs["target"], **options)
    torch.testing.assert_close(got, with_gradients(expected, leaves))


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_z_loss_is_a_squared_logsumexp(backend):
    inputs = arguments(9, 33)
    plain = ft.cross_entropy(**inputs, reduction="none")
    with_z = ft.cross_entropy(**inputs, reduction="none", z_loss=0.5)
    torch.testing.assert_close(with_z - plain, 0.5 * inputs["logits"].logsumexp(-1).square())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_gradcheck(reduction):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 1, "reduction": reduction}
    inputs = linear_arguments(4, 3, 5, torch.float64)
    target = torch.tensor([0, 1, 4, 2])
    leaves = [inputs[name].requires_grad_() for name in LINEAR]

    def call(hidden, weight, bias):
        return ft.linear_cross_entropy(hidden, weight, target, bias=bias, **options)

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("loss", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype), case.wrt)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 30.0, 1e4, 1e30])
def test_magnitudes(cpu, scale, shift, dtype):
    if dtype == torch.float16:
        scale = min(scale, 1e3)
    inputs = arguments(5, 600, scale=scale)
    inputs["logits"] = (inputs["logits"] + shift).to(dtype)
    testing.check("cross_entropy", inputs, ("logits",))


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_certain_rows_keep_their_little_loss(cpu, op):
    """Where the target has nearly all of the probability, what is left is not rounded away."""
    logits = torch.zeros(3, 100)
    logits[torch.arange(3), torch.tensor([0, 50, 99])] = torch.tensor([14.0, 18.0, 30.0])
    inputs = {"target": torch.tensor([0, 50, 99]), "reduction": "none"}
    if op == "cross_entropy":
        inputs["logits"] = logits
    else:
        inputs |= {"hidden": torch.eye(3), "weight": logits.T.contiguous()}
    loss = getattr(ft, op)(**inputs)
    exact = F.cross_entropy(logits.double(), inputs["target"], reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=0.1, atol=1e-8)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_forbidden_classes(cpu, dtype):
    """-inf forbids a class: no probability, no gradient; of the target it is an infinite loss."""
    inputs = arguments(4, 1100, dtype)
    inputs["logits"][:, 5:600] = -float("inf")
    inputs["target"][:] = 3
    testing.check("cross_entropy", inputs | {"reduction": "none"}, ("logits",))
    inputs["logits"][0, 3] = -float("inf")
    loss = ft.cross_entropy(**inputs, reduction="none")
    assert loss[0] == float("inf") and bool(loss[1:].isfinite().all())


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 700, 1099])
def test_nan_where_pytorch_has_it(cpu, at, bad):
    inputs = arguments(3, 1100)
    inputs["logits"][1, at] = bad
    if bad == -float("inf"):
        inputs["logits"][1] = bad
    loss = ft.cross_entropy(**inputs, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    linear = ft.linear_cross_entropy(torch.eye(3), inputs["logits"].T.contiguous().nan_to_num(0),
                                     inputs["target"], reduction="none")  # fmt: skip
    assert linear.shape == (3,)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_rows_to_ignore(backend, op, dtype):
    """They hold NaN, count in no mean, and their gradient is zero."""
    whole = op == "cross_entropy"
    inputs = arguments(7, 65, dtype) if whole else linear_arguments(7, 9, 65, dtype)
    rows = "logits" if whole else "hidden"
    ignored, target = torch.tensor([0, 3, 6]), inputs["target"].clone()
    kept = torch.tensor([1, 2, 4, 5])
    target[ignored] = 3 if whole else -7
    target[kept] = (target[kept] + 4) % 65 if not whole else torch.tensor([9, 8, 60, 1])
    options = {"ignore_index": 3 if whole else -7}
    some = inputs | {"target": target[kept], rows: inputs[rows][kept]}
    inputs[rows][ignored] = NAN
    inputs["target"] = target
    wrt = [rows] if whole else list(LINEAR)
    for reduction in ("mean", "sum"):
        got = testing.evaluate(op, inputs | options | {"reduction": reduction}, wrt)
        expected = testing.evaluate(op, some | options | {"reduction": reduction}, wrt)
        assert bool((got[f"d{rows}"][ignored] == 0).all())
        got[f"d{rows}"] = got[f"d{rows}"][kept]
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x)
    loss = getattr(ft, op)(**inputs, **options, reduction="none")
    assert loss[ignored].tolist() == [0.0, 0.0, 0.0] and bool(loss[kept].isfinite().all())


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_counts(backend, op, rows):
    """A mean of nothing is NaN, as in PyTorch; a sum is zero; gradients are zero."""
    inputs = arguments(rows, 9) if op == "cross_entropy" else linear_arguments(rows, 4, 9)
    inputs["target"] = torch.full((rows,), -100)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if n != "target"}
    assert getattr(ft, op)(**inputs).isnan()
    loss = getattr(ft, op)(**inputs, reduction="sum")
    assert loss == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, list(leaves.values())))
    assert getattr(ft, op)(**inputs, reduction="none").tolist() == [0.0] * rows


@pytest.mark.parametrize("lead", [(), (1,), (3, 0), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_leading_dimensions(backend, op, lead):
    target = torch.randint(0, 6, lead)
    x = torch.randn(*lead, 6, requires_grad=True)
    weights = {} if op == "cross_entropy" else {"weight": torch.randn(6, 6)}
    name = "logits" if op == "cross_entropy" else "hidden"
    loss = getattr(ft, op)(**{name: x}, **weights, target=target, reduction="none")
    loss.sum().backward()
    assert loss.shape == lead and x.grad.shape == x.shape
    assert getattr(ft, op)(**{name: x}, **weights, target=target).shape == ()


@pytest.mark.parametrize("needed", LINEAR)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_only_what_needs_a_gradient_gets_one(cpu, needed, dtype):
    inputs = linear_arguments(20, 33, 500, dtype)
    testing.check("linear_cross_entropy", inputs, (needed,))
    inputs[needed].requires_grad_()
    ft.linear_cross_entropy(**inputs).backward()
    assert [name for name in LINEAR if inputs[name].grad is not None] == [needed]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(cpu, layout, dtype):
    inputs = arguments(7, 70, dtype)
    inputs["logits"] = LAYOUTS[layout](inputs["logits"])
    inputs["target"] = inputs["target"].repeat_interleave(2)[::2]
    testing.check("cross_entropy", inputs, ("logits",))
    for of in ("hidden", "weight"):
        inputs = linear_arguments(37, 40, 70, dtype)
        inputs[of] = LAYOUTS[layout](inputs[of])
        inputs["bias"] = inputs["bias"].repeat_interleave(2)[::2]
        testing.check("linear_cross_entropy", inputs, LINEAR)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 63, 65), (20, 33, 130)], ids=str)
def test_nothing_around_the_inputs_is_read(cpu, shape, dtype):
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
    M, C, V = shape
    for op, inputs, wrt in (
        ("cross_entropy", arguments(M, V, dtype), ("logits",)),
        ("linear_cross_entropy", linear_arguments(M, C, V, dtype), LINEAR),
    ):
        expected = testing.evaluate(op, inputs | options, wrt)
        around = {name: surrounded(x) for name, x in inputs.items()}
        for name, x in testing.evaluate(op, around | options, wrt).items():
            assert torch.equal(x, expected[name]), name


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape(kernels, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    M, C, V = (data.draw(st.integers(1, most)) for most in (90, 70, 900))
    inputs = linear_arguments(M, C, V, dtype)
    options = {
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "z_loss": data.draw(st.sampled_from([0.0, 0.0, 1e-3])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "ignore_index": data.draw(st.integers(0, V)),
    }
    if data.draw(st.booleans()):
        inputs["bias"] = None
    inputs["target"][0] = (options["ignore_index"] + 1) % V if V > 1 else 0
    if options["reduction"] == "mean" and bool((inputs["target"] == options["ignore_index"]).all()):
        options["reduction"] = "sum"
    wrt = [n for n in LINEAR if inputs[n] is not None and data.draw(st.booleans())]
    testing.check("linear_cross_entropy", inputs | options, wrt)
    logits = {"logits": 3 * torch.randn(M, V).to(dtype), "target": inputs["target"]}
    testing.check("cross_entropy", logits | options, ("logits",))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_loss_is_float32(backend, dtype):
    """As under autocast: three digits of bfloat16 would hide what a step of training gains."""
    inputs, linear = arguments(3, 7, dtype), linear_arguments(3, 4, 7, dtype)
    assert ft.cross_entropy(**inputs).dtype == torch.float32
    assert ft.linear_cross_entropy(**linear).dtype == torch.float32
    leaf = inputs["logits"].requires_grad_()
    ft.cross_entropy(**inputs).backward()
    assert leaf.grad.dtype == dtype


def test_linear_loss_needs_no_logits(cpu):
    """A twentieth of the logits' memory suffices, forward and backward, gradients aside."""
    from fast_transformer.benchmarks.memory import peak_memory

    M, C, V = 1024, 64, 50257
    for dtype, part in ((torch.float32, 0.05), (torch.bfloat16, 0.05)):
        inputs = linear_arguments(M, C, V, dtype)
        leaves = [inputs[name].requires_grad_() for name in LINEAR]

        def step(inputs=inputs, leaves=leaves):
            return torch.autograd.grad(ft.linear_cross_entropy(**inputs), leaves)

        step()
        peak = peak_memory(step)
        if peak is None:
            pytest.skip("Linux does not tell")
        gradients = sum(x.nbytes for x in leaves)
        assert peak - gradients <= part * M * V * dtype.itemsize
