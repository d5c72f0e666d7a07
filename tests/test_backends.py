"""The policy: order, choice, strict mode, the record; and what sends a call to the reference."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.utils.checkpoint

import fast_transformer as ft
from fast_transformer import backends
from fast_transformer.backends import Backend, Call, choose
from fast_transformer.ops.attention import BACKENDS as ATTENTION
from fast_transformer.ops.decode import BACKENDS as DECODE
from fast_transformer.ops.mlp import LINEAR_BACKENDS, MLP_BACKENDS
from fast_transformer.ops.norm import BACKENDS as NORM

TABLES = [ATTENTION, DECODE, NORM, LINEAR_BACKENDS, MLP_BACKENDS]


def table(**reasons):
    return {
        name: Backend(lambda: None, None, lambda *_, answer=reason: answer)
        for name, reason in reasons.items()
    }


def test_the_first_that_can_runs():
    assert choose("op", table(triton="no GPU", cpu=None, reference=None)) == "cpu"
    assert choose("op", table(triton=None, cpu=None)) == "triton"


def test_arguments_reach_unsupported():
    seen = []
    backend = Backend(lambda: None, None, lambda *arguments: seen.append(arguments))
    choose("op", {"cpu": backend}, 1, "two")
    assert seen == [(1, "two")]


@pytest.mark.parametrize("backend_table", TABLES)
def test_tables_keep_the_order(backend_table):
    assert list(backend_table) == [name for name in backends.ORDER if name in backend_table]
    assert "reference" in backend_table


def test_a_forced_backend_runs_or_says_why():
    both = table(cpu=None, reference=None)
    with ft.backend("reference"):
        assert choose("op", both) == "reference"
        with ft.backend("cpu"):
            assert choose("op", both) == "cpu"
        assert choose("op", both) == "reference"
    assert choose("op", both) == "cpu"
    message = r"op: the cpu backend was asked for but cannot run \(cpu: dtype float64\)\."
    with ft.backend("cpu"), pytest.raises(RuntimeError, match=message):
        choose("op", table(cpu="dtype float64", reference=None))
    with ft.backend("triton"), pytest.raises(RuntimeError, match="triton: has no such op"):
        choose("op", both)


def test_an_unknown_backend_is_named():
    message = "backend: backend 'gpu' is unknown; accepted are cuda, triton, cpu, reference."
    with pytest.raises(ValueError, match=message), ft.backend("gpu"):
        pass


def test_strict_forbids_the_reference():
    only = table(cpu="dtype float64", reference=None)
    assert choose("op", only) == "reference"
    message = r"op: strict mode forbids the reference backend \(cpu: dtype float64\)\."
    with ft.strict(), pytest.raises(RuntimeError, match=message):
        choose("op", only)
    with ft.strict(), ft.backend("reference"):
        assert choose("op", only) == "reference"
    assert choose("op", only) == "reference"


def test_the_record():
    with backends.record() as calls:
        choose("a", table(cpu=None, reference=None))
        with backends.record() as inner:
            choose("b", table(cpu="too old", reference=None))
    choose("c", table(cpu=None))
    assert calls == [Call("a", "cpu", {})]
    assert inner == [Call("b", "reference", {"cpu": "too old"})]


def test_choices_end_with_their_block_and_stay_in_their_thread():
    seen = []
    with pytest.raises(KeyError), ft.backend("reference"), ft.strict():
        thread = threading.Thread(target=lambda: seen.append(backends.chosen()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [None] and backends.chosen() is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FAST_TRANSFORMER_BACKEND": "reference"}, "reference"),
        ({"FAST_TRANSFORMER_STRICT": "1"}, "strict mode forbids"),
        ({"FAST_TRANSFORMER_STRICT": "0"}, "reference"),
        ({"FAST_TRANSFORMER_BACKEND": "gpu"}, "FAST_TRANSFORMER_BACKEND: backend 'gpu' is unknown"),
    ],
    ids=str,
)
def test_environment(variables, expected):
    program = (
        "import torch, fast_transformer as ft\n"
        "from fast_transformer import backends\n"
        "with backends.record() as calls: ft.layer_norm(torch.zeros(2, 2, dtype=torch.float64))\n"
        "print(calls[0].backend)"
    )
    clean = {n: x for n, x in os.environ.items() if not n.startswith("FAST_TRANSFORMER_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=clean | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert expected in done.stdout + done.stderr


class Tagged(torch.Tensor):
    """A subclass that does nothing."""


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("dtype float64", lambda q: (q.double(), {})),
        ("tensor subclass Tagged", lambda q: (q.as_subclass(Tagged), {})),
        ("device meta", lambda q: (q.to("meta"), {})),
    ],
    ids=str,
)
def test_what_the_kernels_leave_to_the_reference(kernels, reason, change):
    q, options = change(torch.randn(2, 2, 9, 16))
    with backends.record() as calls:
        ft.attention(q, q, q, **options)
    assert calls == [Call("attention", "reference", {"cpu": reason})]
    with ft.strict(), pytest.raises(RuntimeError, match=reason):
        ft.attention(q, q, q, **options)


def test_bias_gets_its_gradient(kernels):
    q, k, v = (torch.randn(2, 2, 9, 16) for _ in range(3))
    bias = torch.randn(2, 1, 9, 9, requires_grad=True)
    ft.attention(q, k, v, bias=bias).sum().backward()
    assert bias.grad is not None
    with torch.no_grad(), backends.record() as calls:
        ft.attention(q, k, v, bias=bias)
    assert calls[0].backend == "cpu"


def test_transforms(kernels):
    """torch.func, and forward-mode derivatives, go through the definition."""
    x, weight = torch.randn(3, 5, 8), torch.randn(8)
    with backends.record() as calls:
        per_item = torch.func.vmap(lambda x: ft.layer_norm(x, weight))(x)
        gradient = torch.func.grad(lambda w: (ft.layer_norm(x, w) ** 2).sum())(weight)
        _, tangent = torch.func.jvp(lambda x: ft.layer_norm(x, weight), (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            out = ft.layer_norm(dual, weight)
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(out).tangent, tangent)
    assert {call.backend for call in calls} == {"reference"}
    torch.testing.assert_close(per_item, ft.layer_norm(x, weight))
    leaf = weight.clone().requires_grad_()
    (ft.layer_norm(x, leaf) ** 2).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


CALLS = {
    "attention": lambda x: ft.attention(x[None], x[None], x[None]),
    "add_norm": lambda x: ft.add_norm(x, x, dropout_p=0.1),
    "linear_act": lambda x: ft.linear_act(x, x[0], activation="gelu"),
    "mlp": lambda x: ft.mlp(x, x[0], None, x[0], None),
}


@pytest.mark.parametrize("op", CALLS)
def test_second_derivatives_say_what_to_do(cpu, op):
    x = torch.randn(2, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(CALLS[op](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; run .*reference"):
        gradient.square().sum().backward()
    with ft.backend("reference"):
        (expected,) = torch.autograd.grad(CALLS[op](x).sum(), x, create_graph=True)
    expected.square().sum().backward()
    if op != "add_norm":
        torch.testing.assert_close(gradient, expected)


def test_the_gradient_runs_where_the_call_ran(kernels):
    x = torch.randn(3, 8, requires_grad=True)
    out = ft.layer_norm(x)
    with ft.backend("reference"):
        out.sum().backward()
    with ft.backend("reference"):
        out = ft.layer_norm(x)
    assert "Norm" not in type(out.grad_fn).__name__
    out.sum().backward()


def test_env():
    facts = ft.env()
    assert set(facts["backends"]) == set(backends.ORDER)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()


def test_a_second_derivative_by_an_input_alone_raises(kernels):
    """torch.autograd.grad goes only where its inputs are, so a Hessian would be zeros."""
    w, target = torch.randn(5, 4), torch.tensor([1, 2])
    calls = {
        "mlp": lambda x: ft.mlp(x, w, None, w.t(), None).sum(),
        "norm": lambda x: ft.add_norm(x, x).square().sum(),
        "cross_entropy": lambda x: ft.cross_entropy(x, target),
        "attention": lambda x: ft.attention(x[None, None], x[None, None], x[None, None]).sum(),
    }  # fmt: skip
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{op}: .*no second derivative"):
            torch.autograd.functional.hessian(call, torch.randn(2, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_graph_of_the_backward_goes_with_checkpoints(kernels, reentrant):
    """Checkpoints let a saved tensor be read once."""
    x = torch.randn(2, 4, requires_grad=True)
    w = torch.randn(5, 4, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(ft.linear_act, x, w, use_reentrant=reentrant)
    y.sum().backward(create_graph=True)
    torch.testing.assert_close(w.grad, x.sum(0).expand(5, 4))
