"""gated_mlp, and what the MLPs keep for backward: against PyTorch's, and against the definition."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, surrounded
from operators import check_operator
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer import testing
from fast_transformer.benchmarks.memory import peak_memory

NAN = float("nan")
ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu", "silu"]
WEIGHTS = ("x", "w_gate", "w_up", "w_down")
ALL = (*WEIGHTS, "b_gate", "b_up", "b_down")
CASES = [case for case in testing.cases("mlp", "test") if case.op == "gated_mlp"]


def arguments(M, C, F, N, dtype=torch.float32, biased=True):
    made = {
        "x": torch.randn(M, C),
        "w_gate": torch.randn(F, C) * max(C, 1) ** -0.5,
        "w_up": torch.randn(F, C) * max(C, 1) ** -0.5,
        "w_down": torch.randn(N, F) * max(F, 1) ** -0.5,
    }
    if biased:
        made |= {"b_gate": torch.randn(F), "b_up": torch.randn(F), "b_down": torch.randn(N)}
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
    inputs = {name: x.double() for name, x in arguments(5, 7, 11, 3).items()}
    x, gate, up, down, b_gate, b_up, b_down = inputs.values()
    hidden = THEIRS[activation](x @ gate.T + b_gate) * (x @ up.T + b_up)
    with ft.backend("reference"):
        out = ft.gated_mlp(**inputs, activation=activation)
    torch.testing.assert_close(out, hidden @ down.T + b_down)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradcheck(activation):
    leaves = {n: x.double().requires_grad_() for n, x in arguments(2, 3, 4, 2).items()}

    def call(*values):
        return ft.gated_mlp(**dict(zip(leaves, values, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recomputed_bits(cpu, case, dtype):
    """What is made again is what would have been kept."""
    inputs = case.inputs(dtype)
    kept = testing.evaluate("gated_mlp", inputs | {"recompute": False}, case.wrt)
    made = testing.evaluate("gated_mlp", inputs | {"recompute": True}, case.wrt)
    for name, x in kept.items():
        assert torch.equal(x, made[name]), name


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("M", [1, 16, 17, 65, 2113])
def test_recomputed_bits_of_mlp(cpu, M, dropout_p, dtype):
    inputs = mlp_arguments(M, 24, 2000, 20, dtype)
    options = {"dropout_p": dropout_p, "seed": torch.tensor(4)}
    kept = testing.evaluate("mlp", inputs | options, tuple(inputs))
    made = testing.evaluate("mlp", inputs | options | {"recompute": True}, tuple(inputs))
    for name, x in kept.items():
        assert torch.equal(x, made[name]), name


def saved(call):
    """How many elements autograd keeps for a call, parameters and inputs included."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, id):
        call()
    return sum(sizes)


def test_recompute_keeps_nothing_of_the_hidden_layer(cpu):
    M, C, hidden = 40, 8, 50
    gated = {n: x.requires_grad_() for n, x in arguments(M, C, hidden, C).items()}
    plain = {n: x.requires_grad_() for n, x in mlp_arguments(M, C, hidden, C).items()}
    for op, inputs, of_hidden, bias in (
        (ft.gated_mlp, gated, 2 * M * hidden, 2 * hidden), (ft.mlp, plain, M * hidden, hidden)
    ):  # fmt: skip
        kept = saved(lambda op=op, inputs=inputs: op(**inputs))
        made = saved(lambda op=op, inputs=inputs: op(**inputs, recompute=True))
        assert kept - made == of_hidden - bias  # the bias is needed instead
        small = [inputs["x"].numel(), *(x.numel() for n, x in inputs.items() if n[0] != "x")]
        assert made <= sum(small)


@pytest.mark.parametrize("op", ["mlp", "gated_mlp"])
def test_recompute_lowers_the_peak(cpu, op):
    M, C, hidden = 16384, 16, 1024
    make = arguments if op == "gated_mlp" else mlp_arguments
    inputs = {n: x.requires_grad_() for n, x in make(M, C, hidden, C).items()}
    call = getattr(ft, op)

    def step(recompute):
        return lambda: call(**inputs, recompute=recompute).sum().backward()

    step(True)()
    kept, made = peak_memory(step(False)), peak_memory(step(True))
    if kept is None:
        pytest.skip("the peak of this process's memory cannot be read here")
    assert kept - made > 0.6 * 4 * M * hidden * (2 if op == "gated_mlp" else 1)


@pytest.mark.parametrize("needed", ALL)
@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_needs_a_gradient_gets_one(cpu, needed, recompute):
    inputs = arguments(5, 7, 9, 4)
    testing.check("gated_mlp", inputs | {"recompute": recompute}, (needed,))
    inputs[needed].requires_grad_()
    ft.gated_mlp(**inputs, recompute=recompute).sum().backward()
    assert [name for name in ALL if inputs[name].grad is not None] == [needed]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_everywhere(cpu, activation, dtype):
    """The activation and its derivative, from the deepest tail to the largest gate."""
    largest = 200.0 if dtype == torch.float16 else 1e15
    ends = torch.tensor([-largest, -88.0, -87.0, -0.0, 0.0, 87.0, 88.0, 89.0, largest])
    gate = torch.cat([torch.linspace(-14, 14, 701), ends])
    one = torch.ones(1, 1, dtype=dtype)
    for part in (slice(0, 701), slice(701, 706), slice(706, None)):
        x = gate[part].to(dtype)[:, None]
        weights = {"w_gate": one, "w_up": torch.zeros_like(one), "w_down": one}
        inputs = {"x": x, "b_up": one[0], "activation": activation, **weights}
        testing.check("gated_mlp", inputs, ("x",))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 30.0, 1e8])
def test_magnitudes(cpu, scale, dtype):
    if dtype == torch.float16:
        scale = min(scale, 30.0)
    inputs = arguments(5, 33, 70, 20, dtype=dtype)
    inputs["x"] = (torch.randn(5, 33) * scale).to(dtype)
    testing.check("gated_mlp", inputs, ALL)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 0), (2, 3), (2, 3, 4)], ids=str)
def test_leading_dimensions(backend, lead):
    inputs = {n: x.requires_grad_() for n, x in arguments(1, 8, 16, 4).items()}
    inputs["x"] = torch.randn(*lead, 8, requires_grad=True)
    out = ft.gated_mlp(**inputs)
    out.sum().backward()
    assert out.shape == (*lead, 4) and inputs["x"].grad.shape == (*lead, 8)
    assert all(bool(x.grad.isfinite().all()) for x in inputs.values())


@pytest.mark.parametrize("sizes", [(3, 0, 5, 4), (3, 4, 0, 5), (3, 4, 5, 0)], ids=str)
def test_empty_sizes(cpu, sizes):
    testing.check("gated_mlp", arguments(*sizes), ALL)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ALL)
def test_strides(cpu, layout, of):
    inputs = arguments(37, 40, 70, 20)
    if inputs[of].dim() == 1:
        inputs[of] = inputs[of].repeat_interleave(2)[::2]
    else:
        inputs[of] = LAYOUTS[layout](inputs[of])
    testing.check("gated_mlp", inputs, ALL)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 63, 65, 17), (70, 33, 130, 67)], ids=str)
def test_nothing_around_the_inputs_is_read(cpu, shape, dtype):
    inputs = arguments(*shape, dtype=dtype)
    around = {name: surrounded(x) for name, x in inputs.items()}
    for options in ({}, {"recompute": True}):
        expected = testing.evaluate("gated_mlp", inputs | options, ALL)
        for name, x in testing.evaluate("gated_mlp", around | options, ALL).items():
            assert torch.equal(x, expected[name]), name


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape(kernels, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    M, C, F, N = (data.draw(st.integers(1, 140)) for _ in range(4))
    inputs = arguments(M, C, F, N, dtype=dtype)
    for name in ("b_gate", "b_up", "b_down"):
        if data.draw(st.booleans()):
            inputs[name] = None
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS))}
    options["recompute"] = data.draw(st.booleans())
    wrt = [name for name in ALL if inputs[name] is not None and data.draw(st.booleans())]
    testing.check("gated_mlp", inputs | options, wrt)


def test_double_backward_raises(cpu):
    inputs = {n: x.requires_grad_() for n, x in arguments(3, 4, 5, 4).items()}
    (dx,) = torch.autograd.grad(ft.gated_mlp(**inputs).sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_mlp: its fused kernels have no second"):
        dx.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled(cpu, dynamic, recompute):
    torch._dynamo.reset()

    def step(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
        return ft.gated_mlp(
            x, w_gate, w_up, w_down, activation="gelu_tanh",
            b_gate=b_gate, b_up=b_up, b_down=b_down, recompute=recompute,
        )  # fmt: skip

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for M in (3, 5):
        leaves = [x.requires_grad_() for x in arguments(M, 8, 12, 8).values()]
        for x, y in zip(
            torch.autograd.grad(compiled(*leaves).sum(), leaves),
            torch.autograd.grad(step(*leaves).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


def operator_calls():
    x, gate, up, down, b_gate, b_up, b_down = arguments(6, 8, 7, 4).values()
    x, hidden, dy = x.view(2, 3, 8), torch.randn(2, 3, 7), torch.randn(2, 3, 4)
    yield "gated_mlp_fwd", (x, gate, b_gate, up, b_up, down, b_down, 4, True)
    yield "gated_mlp_fwd", (x, gate, None, up, None, down, None, 2, False)
    weights = (gate, b_gate, up, b_up, down)
    yield "gated_mlp_bwd", (dy, x, *weights, hidden, hidden + 1, 4, *[True] * 7)
    flags = (False, True, False, False, True, True, False)
    yield "gated_mlp_bwd", (dy, x, *weights, None, None, 1, *flags)


@pytest.mark.parametrize(("name", "arguments"), list(operator_calls()))
def test_opcheck(kernels, name, arguments):
    check_operator(name, arguments)


def test_autocast(cpu):
    inputs = arguments(3, 4, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.gated_mlp(**inputs).dtype == torch.bfloat16


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def call(x=None, w_gate=None, w_up=None, w_down=None, **options):
    x, w_gate = t(3, 8) if x is None else x, t(6, 8) if w_gate is None else w_gate
    w_up, w_down = t(6, 8) if w_up is None else w_up, t(4, 6) if w_down is None else w_down
    return lambda: ft.gated_mlp(x, w_gate, w_up, w_down, **options)


ERRORS = [
    (call([1.0]), TypeError, "gated_mlp: x must be a tensor, got list."),
    (
        call(t()),
        ValueError,
        "gated_mlp: x has no dimension; its last one holds the input features.",
    ),
    (
        call(w_up=t(6, 8, dtype=torch.bfloat16)),
        TypeError,
        "gated_mlp: w_up has dtype bfloat16 but x has float32; they must match.",
    ),
    (
        call(w_gate=t(8, 6)),
        ValueError,
        "gated_mlp: w_gate has shape (8, 6); x has 8 features, so it must be (out, 8).",
    ),
    (
        call(w_up=t(7, 8)),
        ValueError,
        "gated_mlp: w_up has shape (7, 8) but w_gate has (6, 8); they must match.",
    ),
    (
        call(w_down=t(4, 5)),
        ValueError,
        "gated_mlp: w_down has shape (4, 5); w_gate gives 6, so it must be (out, 6).",
    ),
    (
        call(b_up=t(4)),
        ValueError,
        "gated_mlp: b_up has shape (4,); w_up gives 6 features, so it must be (6,).",
    ),
    (
        call(activation="swish"),
        ValueError,
        "gated_mlp: activation is 'swish'; accepted are None, 'gelu', 'gelu_tanh', 'relu' and "
        "'silu'.",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_message(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_the_defaults_above_are_right():
    """Else the rows above would prove nothing."""
    call()()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_module(backend, activation, bias):
    module = ft.nn.GatedMLP(8, 20, activation=activation, bias=bias)
    names = ["gate_proj", "up_proj", "down_proj"]
    kinds = ["weight", "bias"] if bias else ["weight"]
    assert list(module.state_dict()) == [f"{name}.{kind}" for name in names for kind in kinds]
    x = torch.randn(2, 3, 8)
    gate = THEIRS[activation](module.gate_proj(x))
    torch.testing.assert_close(module(x), module.down_proj(gate * module.up_proj(x)))
    fired = []
    module.up_proj.register_forward_hook(lambda *_: fired.append(True))
    torch.testing.assert_close(module(x), module.down_proj(gate * module.up_proj(x)))
    assert len(fired) == 2  # a child that is watched is called
    with pytest.raises(ValueError, match="GatedMLP: activation is 'tanh'; accepted are gelu, "):
        ft.nn.GatedMLP(8, 20, activation="tanh")
