"""The numbers of AdamW: against float64, against torch's, for any layout, size and value."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import check_operator

import fast_transformer as ft
from fast_transformer import backends, testing
from fast_transformer.ops import adamw

SHAPES = [(1,), (63,), (65,), (127,), (), (0,), (3, 5), (17, 33, 2), (197, 131)]
OPTIONS = {
    "default": {},
    "plain": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "all": {"amsgrad": True, "maximize": True, "eps": 1e-3, "lr": 0.02},
    "fast": {"betas": (0.2, 0.4), "lr": 1e-2},
    "none": {"betas": (0.0, 0.0), "eps": 1e-2},
    "slow": {"betas": (0.99, 0.9999)},
}
STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
needs_kernels = pytest.mark.usefixtures("kernels")


def parameters(shapes, dtype=torch.float32, scale=1.0):
    return [torch.nn.Parameter((torch.randn(shape) * scale).to(dtype)) for shape in shapes]


def twins(params, dtype=None):
    """The same values in parameters of their own."""
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def set_gradients(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.to(p.dtype)


def results(optimizer):
    """Parameters and state by name, each end to end."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {"params": torch.cat([p.detach().flatten() for p in params])}
    for name in STATE:
        if name in optimizer.state[params[0]]:
            found[name] = torch.cat([optimizer.state[p][name].flatten() for p in params])
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_error_over_many_steps(cpu, options, dtype):
    """At most twice that of torch's foreach, after one step and after a hundred."""
    options = OPTIONS[options]
    if dtype != torch.float32:  # a parameter of 2 has to move by more than its rounding
        options = {"eps": 1e-4} | options | {"lr": 0.02}
    ours = parameters(SHAPES, dtype)
    same, exact = twins(ours), twins(ours, torch.float64)
    optimizers = [
        ft.optim.AdamW(ours, **options),
        torch.optim.AdamW(same, foreach=True, **options),
        torch.optim.AdamW(exact, foreach=True, **options),
    ]
    for step in range(100):
        gradients = [(0.3 + torch.randn(shape)).to(dtype) for shape in SHAPES]
        for params, optimizer in zip((ours, same, exact), optimizers, strict=True):
            set_gradients(params, gradients)
            optimizer.step()
        if step in (0, 1, 99):
            testing.assert_close_to_reference(*map(results, optimizers))
    assert all(optimizers[0].state[p]["step"] == 100 for p in ours)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-6, 1e6, 1e18])
def test_magnitudes(cpu, magnitude):
    ours = parameters(SHAPES, scale=1e-3)
    same, exact = twins(ours), twins(ours, torch.float64)
    optimizers = [
        ft.optim.AdamW(ours, max_grad_norm=math.inf),
        torch.optim.AdamW(same, foreach=True),
        torch.optim.AdamW(exact, foreach=True),
    ]
    for _ in range(5):
        gradients = [torch.randn(shape) * magnitude for shape in SHAPES]
        for params, optimizer in zip((ours, same, exact), optimizers, strict=True):
            set_gradients(params, gradients)
            optimizer.step()
    testing.assert_close_to_reference(*map(results, optimizers))
    norm = torch.cat([g.double().flatten() for g in gradients]).norm()
    torch.testing.assert_close(optimizers[0].grad_norm.double(), norm, rtol=1e-7, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize(
    "value", [0.0, 1e-45, 1e-30, 3e38, math.inf, -math.inf, math.nan], ids=str
)  # fmt: skip
def test_special_values(cpu, value, eps):
    """What is finite in torch's step is so here, whatever lies in the next lane."""
    for place in (0, 5, 16, 34):
        ours = parameters([(35,)])
        gradient = torch.randn(35)
        gradient[place] = value
        same = twins(ours)
        for params, kind in ((ours, ft.optim.AdamW), (same, torch.optim.AdamW)):
            optimizer = kind(params, eps=eps)
            for _ in range(3):
                set_gradients(params, [gradient])
                optimizer.step()
        finite = same[0].isfinite()
        assert torch.equal(ours[0].isfinite(), finite)
        torch.testing.assert_close(ours[0][finite], same[0][finite], rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e4])
def test_clipping(cpu, max_norm, dtype):
    """As clip_grad_norm_ before torch's step, but the gradients stay."""
    ours = parameters(SHAPES, dtype)
    same, exact = twins(ours), twins(ours, torch.float64)
    optimizers = [
        ft.optim.AdamW(ours, eps=1e-4, max_grad_norm=max_norm),
        torch.optim.AdamW(same, eps=1e-4, foreach=True),
        torch.optim.AdamW(exact, eps=1e-4, foreach=True),
    ]
    for _ in range(10):
        gradients = [torch.randn(shape).to(dtype) for shape in SHAPES]
        for params in (ours, same, exact):
            set_gradients(params, [g.clone() for g in gradients])
        for params in (same, exact):
            norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(optimizers[0].grad_norm, norm.float(), rtol=1e-6, atol=0)
        assert optimizers[0].grad_norm.shape == ()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, gradients, strict=True))
    testing.assert_close_to_reference(*map(results, optimizers))


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_a_norm_that_is_not_finite(cpu, value):
    """NaN where clip_grad_norm_ would make one, and nowhere else."""
    ours = parameters([(40,), (3,)])
    gradients = [torch.randn(40), torch.randn(3)]
    gradients[0][7] = value
    same = twins(ours)
    for params, optimizer in (
        (ours, ft.optim.AdamW(ours, max_grad_norm=1.0)),
        (same, torch.optim.AdamW(same)),
    ):
        set_gradients(params, [g.clone() for g in gradients])
        if params is same:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    for x, y in zip(ours, same, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 47, 1000])
def test_memory_around_tensors_is_left_alone(cpu, dtype, size):
    """Every part lies in NaN, which stays NaN and reaches no result."""
    arenas = []

    def hidden(values):
        arenas.append(torch.full((size + 64,), math.nan).to(dtype))
        arenas[-1][32:-32] = values
        return arenas[-1][32:-32]

    ours = parameters([(size,)], dtype)
    plain = twins(ours)
    gradient = torch.randn(size).to(dtype)
    found = []
    for (p,), hide in ((ours, hidden), (plain, lambda x: x)):
        optimizer = ft.optim.AdamW([p], amsgrad=True, max_grad_norm=0.1)
        p.grad = gradient
        optimizer.step()
        state = optimizer.state[p]
        p.data, p.grad = hide(p.data), hide(p.grad)
        state.update({name: hide(state[name]) for name in STATE})
        optimizer.step()
        found.append(results(optimizer))
    assert len(arenas) == 5
    assert all(a[:32].isnan().all() and a[-32:].isnan().all() for a in arenas)
    assert all(torch.equal(found[0][name], x) for name, x in found[1].items())


LAYOUTS = {
    "transposed": lambda: torch.randn(9, 70).t(),
    "channels-last": lambda: torch.randn(3, 5, 7, 9).contiguous(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(2, 5, 3, 7).permute(3, 0, 2, 1),
    "ones": lambda: torch.randn(4, 1, 6)[:, :1],
    "sliced": lambda: torch.randn(10, 33)[:, 1:20],
    "every-second": lambda: torch.randn(66)[::2],
}


@pytest.mark.smoke
@pytest.mark.parametrize("own_layout", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernels, layout, own_layout):
    """What is dense and laid out alike is updated where it lies; the rest is torch's, and right."""
    made = LAYOUTS[layout]()
    dense = layout not in ("sliced", "every-second")
    contiguous = made.is_contiguous()
    ours = [torch.nn.Parameter(made)]
    same = [torch.nn.Parameter(made.clone())]
    optimizer, stock = ft.optim.AdamW(ours, max_grad_norm=1.0), torch.optim.AdamW(same)
    for _ in range(3):
        gradient = torch.randn(made.shape)
        ours[0].grad = torch.empty_like(made).copy_(gradient) if own_layout else gradient
        if not own_layout and contiguous and made.dim() > 1:
            ours[0].grad = gradient.mT.contiguous().mT
        same[0].grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(same, 1.0)
        with backends.record() as calls:
            optimizer.step()
        stock.step()
    torch.testing.assert_close(ours[0], same[0])
    assert ours[0].data_ptr() == made.data_ptr() and ours[0].stride() == made.stride()
    (call,) = calls
    alike = all(
        a == b or n == 1
        for n, a, b in zip(made.shape, made.stride(), ours[0].grad.stride(), strict=True)
    )
    assert call.backend == ("cpu" if dense and alike else "reference")
    if call.backend == "reference":
        assert "not dense, or" in call.reasons["cpu"]


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=12),
    st.sampled_from(testing.DTYPES),
    st.booleans(),
    st.sampled_from([None, 1e-3, 10.0]),
)
@needs_kernels
def test_any_sizes(sizes, dtype, amsgrad, max_norm):
    torch.manual_seed(sum(sizes))
    ours = parameters(sizes, dtype)
    same = twins(ours, torch.float64)
    optimizer = ft.optim.AdamW(ours, lr=0.1, amsgrad=amsgrad, max_grad_norm=max_norm)
    stock = torch.optim.AdamW(same, lr=0.1, amsgrad=amsgrad)
    with ft.backend("cpu"):
        gradients = [torch.randn(size).to(dtype) for size in sizes]
        set_gradients(ours, gradients)
        optimizer.step()
    set_gradients(same, gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(same, max_norm)
    stock.step()
    eps = torch.finfo(dtype).eps
    for x, y in zip(ours, same, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=eps, atol=0.1 * eps + 1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_bits_for_every_thread_count(cpu, threads, dtype):
    shapes = [(5,), (70_000,), (1,), (33, 1000), (16_384,), *((7, n) for n in range(90))]
    start = parameters(shapes, dtype)
    gradients = [torch.randn(shape).to(dtype) for shape in shapes]
    found = []
    for count in (1, 2, 5, 1):
        threads(count)
        params = twins(start)
        optimizer = ft.optim.AdamW(params, amsgrad=True, max_grad_norm=0.7)
        for _ in range(3):
            set_gradients(params, gradients)
            optimizer.step()
        found.append({**results(optimizer), "norm": optimizer.grad_norm})
    for other in found[1:]:
        assert all(torch.equal(other[name], x) for name, x in found[0].items())


@needs_kernels
def test_norm_keeps_what_float32_would_lose():
    large, small = torch.tensor([1e30]), torch.full((1 << 20,), 1e-25)
    square = torch.ops.fast_transformer.sum_of_squares
    assert square([large]).item() == large.double().square().item()
    assert math.isclose(square([small]).item(), small[0].double().item() ** 2 * 2**20)
    many = torch.rand(3_000_001) + 1
    exact = math.fsum(many.double().square().tolist())
    assert math.isclose(square([many]).item(), exact, rel_tol=1e-14)


@needs_kernels
def test_what_the_kernel_says_of_lists_it_cannot_take():
    """The second line of checks: nothing is touched where one fails."""
    run = torch.ops.fast_transformer.adamw_.default
    numbers = 0.1, 0.9, 0.999, 0.01, 1e-8, 1.0

    def lists(n=2):
        return [[torch.ones(4, 3) for _ in range(n)] for _ in range(4)] + [
            [], [torch.zeros(()) for _ in range(n)]
        ]  # fmt: skip

    def wrong(message, place, *tensors):
        made = lists()
        made[place] = [*made[place][: 2 - len(tensors)], *tensors]
        before = [[x.clone() for x in own] for own in made]
        with pytest.raises(RuntimeError, match=message):
            run(*made, *numbers)
        for own, copies in zip(made, before, strict=True):
            assert all(map(torch.equal, own, copies))

    for place in (1, 2, 3):
        wrong("gradient and state 1 must have", place, torch.ones(3, 4))
        wrong("gradient and state 1 must have", place, torch.ones(3, 4).t())
        wrong("gradient and state 1 must have", place, torch.ones(4, 3).bfloat16())
        wrong("gradient and state 1 must have", place, torch.ones(12))
    wrong("every parameter needs", 4, torch.ones(4, 3))
    wrong("parameter 1 is not dense", 0, torch.ones(4, 6)[:, ::2])
    wrong("take float32", 0, torch.ones(4, 3).double())
    wrong("floating", 0, torch.ones(4, 3).bool())
    wrong("step must be", 5, torch.zeros(2))
    wrong("step must be", 5, torch.zeros((), dtype=torch.int64))
    empty = torch.ones(4, 3)
    empty.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        run([torch.ones(4, 3)], [empty], *lists(1)[2:], *numbers)
    with pytest.raises(RuntimeError, match="every parameter needs"):
        run(*lists()[:5], [], *numbers)


@needs_kernels
@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(amsgrad):
    lists = [[torch.randn(5, 3).abs(), torch.rand(2)] for _ in range(5 if amsgrad else 4)]
    lists += [] if amsgrad else [[]]
    steps = [torch.zeros(()), torch.ones(())]
    check_operator("adamw_", (*lists, steps, 0.1, 0.9, 0.999, 0.01, 1e-8, 1.0))
    check_operator("sum_of_squares", (lists[0],))


def test_overlap_is_found():
    memory = torch.zeros(100)

    def own(begin, end):
        return adamw.Tensors([memory[begin:end]], [], [torch.zeros(4)], [torch.zeros(4)], [], [])

    assert adamw._overlapping([own(0, 10), own(10, 20), own(20, 20)]) == set()
    assert adamw._overlapping([own(0, 10), own(9, 20), own(20, 30)]) == {1}
    assert adamw._overlapping([own(5, 10), own(0, 50), own(40, 60), own(60, 61)]) == {1, 2}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_infinite_stays_so(cpu, dtype, weight_decay):
    values = torch.tensor([-math.inf, 1.0, math.inf, math.nan], dtype=dtype).repeat(5)
    found, expected = (torch.nn.Parameter(values.clone()) for _ in range(2))
    for p, kind in ((found, ft.optim.AdamW), (expected, torch.optim.AdamW)):
        p.grad = torch.zeros_like(p)
        kind([p], weight_decay=weight_decay).step()
    torch.testing.assert_close(found.detach(), expected.detach(), equal_nan=True)
