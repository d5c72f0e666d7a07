"""linear_act and mlp on weights that lie (in, out) in memory, as GPT-2's Conv1D holds them."""

import pytest
import torch
from operators import check_operator

import fast_transformer as ft
from fast_transformer import testing

ROWS = (1, 2, 3, 4, 5, 8, 13, 17, 65)
SIZES = ((1, 1), (2, 3), (31, 17), (64, 64), (77, 100), (300, 33), (768, 1030), (3073, 16))


def exact(x, w, b, activation=None):
    with ft.backend("reference"):
        return ft.linear_act(x.double(), w.double().t(), b.double(), activation=activation)


def near(got, plain, truth):
    testing.assert_close_to_reference({"y": got}, {"y": plain}, {"y": truth})


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_number_of_rows(cpu, dtype, size):
    K, N = size
    for M in ROWS:
        x, w, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.randn(N).to(dtype)
        with ft.backend("reference"):
            plain = ft.linear_act(x, w.t(), b, activation="gelu_tanh")
        near(ft.linear_act(x, w.t(), b, activation="gelu_tanh"), plain, exact(x, w, b, "gelu_tanh"))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 3, 16, 70])
def test_gradients_lie_as_the_weights_do(cpu, dtype, M):
    C, F = 77, 130
    x, w1, w2 = torch.randn(M, C), torch.randn(C, F) / 9, torch.randn(F, C) / 11
    b1, b2, weights = torch.randn(F), torch.randn(C), torch.randn(M, F).to(dtype)
    inputs = [t.to(dtype).requires_grad_() for t in (x, w1, b1, w2, b2)]

    def run(inputs):
        x, w1, b1, w2, b2 = inputs
        seed = torch.tensor(5)
        h = ft.mlp(x, w1.t(), b1, w2.t(), b2, activation="gelu_tanh", dropout_p=0.2, seed=seed)
        y = ft.linear_act(h, w1.t(), b1, activation="silu")
        return (y, *torch.autograd.grad(y, inputs, weights.to(y.dtype)))

    found = run(inputs)
    with ft.backend("reference"):
        plain = run(inputs)
        truth = run([t.detach().double().requires_grad_() for t in inputs])
    names = ("y", "x", "w1", "b1", "w2", "b2")
    as_dict = [dict(zip(names, ts, strict=True)) for ts in (found, plain, truth)]
    testing.assert_close_to_reference(*as_dict)
    for gradient, tensor in zip(found[1:], inputs, strict=True):
        assert gradient.stride() == tensor.stride()


def test_no_copy_is_made(cpu, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *args, **kwargs: pytest.fail("a copy"))
    w = torch.randn(20, 30)
    ft.linear_act(torch.randn(3, 20), w.t())
    ft.linear_act(torch.randn(3, 8), w[:8, :24].t())  # a part of a larger one
    ft.mlp(torch.randn(3, 20), w.t(), None, w, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 4, 30])
def test_a_part_of_a_larger_weight_amid_nan(cpu, dtype, M):
    K, N = 75, 83
    whole = torch.full((K + 2, N + 5), torch.nan, dtype=dtype)
    whole[1:-1, 2:-3] = torch.randn(K, N).to(dtype)
    part = whole[1:-1, 2:-3]
    x = torch.randn(M, K).to(dtype)
    assert torch.equal(ft.linear_act(x, part.t()), ft.linear_act(x, part.clone().t()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 2, 4, 11, 40])
def test_the_same_bits_for_every_thread_count(cpu, threads, dtype, M):
    x, w = torch.randn(M, 768).to(dtype), torch.randn(768, 2304).to(dtype)
    threads(1)
    alone = ft.linear_act(x, w.t())
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(ft.linear_act(x, w.t()), alone)


def test_a_nan_in_the_last_row_of_an_odd_number_stays_there(cpu):
    """Pairs of bfloat16 are multiplied together; the last one has no partner."""
    x, w = torch.randn(2, 7).bfloat16(), torch.randn(7, 40).bfloat16()
    x[0, 6] = torch.nan
    y = ft.linear_act(x, w.t())
    assert y[0].isnan().all() and y[1].isfinite().all()
    w[6, 3] = torch.inf
    assert ft.linear_act(x, w.t())[1].isfinite().sum() == 39


def test_compiled(cpu):
    w = torch.randn(20, 30, requires_grad=True)
    x = torch.randn(5, 20, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: ft.mlp(x, w.t(), None, w, None), fullgraph=True, backend="aot_eager"
    )
    y, z = compiled(x, w), ft.mlp(x, w.t(), None, w, None)
    for a, b in zip(*(torch.autograd.grad(t.sum(), (x, w)) for t in (y, z)), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("activation", [0, 2])
def test_opcheck(kernels, activation):
    x, w, pre = torch.randn(5, 20), torch.randn(20, 30), torch.randn(5, 30)
    for op, arguments in (
        ("linear_act_fwd", (x, w.t(), None, activation, True)),
        ("linear_act_bwd", (pre, x, w.t(), pre, activation, True, True, True)),
        ("mlp_fwd", (x, w.t(), None, w, None, None, 2, 0.0, True)),
        ("mlp_bwd", (x, x, w.t(), None, w, pre, None, 2, 0.0, True, True, True, True, True)),
    ):
        check_operator(op, arguments)
