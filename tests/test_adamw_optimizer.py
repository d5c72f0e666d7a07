"""ft.optim.AdamW in the place of torch.optim.AdamW: state, groups, hooks, scalers, fallbacks."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

import fast_transformer as ft
from fast_transformer import backends


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 5)).to(dtype)


def backward(model, seed=0, dtype=torch.float32):
    model.zero_grad()
    x = torch.randn(8, 13, generator=torch.Generator().manual_seed(seed)).to(dtype)
    loss = model(x).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps=3, seed=0):
    for step in range(steps):
        backward(model, seed + step)
        optimizer.step()


def assert_same(model, other, **tolerance):
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def assert_equal(model, other):
    assert_same(model, other, rtol=0, atol=0)


@pytest.mark.smoke
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_dict_is_torchs_both_ways(kernels, amsgrad):
    model, stock = network(), network()
    ours = ft.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=amsgrad, max_grad_norm=100.0)
    theirs = torch.optim.AdamW(stock.parameters(), lr=1e-2, amsgrad=amsgrad)
    train(model, ours)
    train(stock, theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for i, own in b["state"].items():
        assert list(a["state"][i]) == list(own)
        for name, x in own.items():
            torch.testing.assert_close(a["state"][i][name], x)
    file = io.BytesIO()
    torch.save(a, file)
    file.seek(0)
    model_2, stock_2 = network(), network()
    for new, old in ((model_2, stock), (stock_2, model)):
        new.load_state_dict(old.state_dict())
    crossed = torch.optim.AdamW(stock_2.parameters())
    crossed.load_state_dict(torch.load(file))
    again = ft.optim.AdamW(model_2.parameters(), max_grad_norm=100.0)
    again.load_state_dict(copy.deepcopy(b))
    assert again.max_grad_norm == 100.0
    pairs = ((model, ours), (stock, theirs), (model_2, again), (stock_2, crossed))
    for net, optimizer in pairs:
        train(net, optimizer, seed=7)
    assert isinstance(ours, torch.optim.AdamW)
    for net, _ in pairs[1:]:
        assert_same(model, net)


def test_loading_goes_on_where_it_was(kernels):
    """After load_state_dict no tensor of the state before is used."""
    model = network()
    optimizer = ft.optim.AdamW(model.parameters())
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, seed=5)
    expected = copy.deepcopy(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, seed=5)
    assert_equal(model, expected)
    optimizer.state.clear()
    train(model, optimizer, 1)
    assert all(own["step"] == 1 for own in optimizer.state.values())


@pytest.mark.smoke
@pytest.mark.parametrize("copied", ["pickle", "deepcopy"])
def test_copies(kernels, copied):
    model = network()
    optimizer = ft.optim.AdamW(model.parameters(), max_grad_norm=0.01)
    train(model, optimizer)
    pair = (model, optimizer)
    twin, other = pickle.loads(pickle.dumps(pair)) if copied == "pickle" else copy.deepcopy(pair)
    assert type(other) is ft.optim.AdamW
    assert other.max_grad_norm == 0.01 and torch.equal(other.grad_norm, optimizer.grad_norm)
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    train(model, optimizer, seed=9)
    train(twin, other, seed=9)
    assert_equal(model, twin)


@pytest.mark.smoke
def test_groups_schedules_and_tensors(kernels):
    """Each group has its own numbers; they may change, be tensors, and grow."""
    pairs = []
    for kind, extra in ((ft.optim.AdamW, {"max_grad_norm": math.inf}), (torch.optim.AdamW, {})):
        model = network()
        layers = list(model)
        groups = [
            {"params": list(layers[0].parameters()), "lr": 3e-3, "weight_decay": 0.0},
            {"params": list(layers[1].parameters()), "betas": (0.5, 0.7), "amsgrad": True},
        ]
        optimizer = kind(groups, lr=torch.tensor(1e-2), **extra)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.02], total_steps=20)
        for step in range(6):
            backward(model, step)
            optimizer.step()
            schedule.step()
        optimizer.add_param_group({"params": layers[3].parameters(), "eps": 1e-3, "lr": 0.1})
        for step in range(6):
            backward(model, step)
            if step % 2:
                layers[0].bias.grad = None
            optimizer.step()
        pairs.append((model, optimizer))
    assert_same(pairs[0][0], pairs[1][0], rtol=1e-5, atol=1e-6)
    for p, q in zip(*(model.parameters() for model, _ in pairs), strict=True):
        assert pairs[0][1].state[p]["step"] == pairs[1][1].state[q]["step"]


def test_one_call_for_a_group(kernels):
    model = network()
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[3])]
    optimizer = ft.optim.AdamW(groups, max_grad_norm=1.0)
    for _ in range(2):
        backward(model)
        with backends.record() as calls, torch.profiler.profile() as profile:
            optimizer.step()
        assert [(call.op, call.backend, call.reasons) for call in calls] == [
            ("adamw", "cpu", {})
        ] * 2
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["fast_transformer::adamw_"] == 2
        assert counts["fast_transformer::sum_of_squares"] == 1
        assert counts["Optimizer.step#AdamW.step"] == 1


def test_closure_and_hooks(kernels):
    model = network()
    optimizer = ft.optim.AdamW(model.parameters())
    met = []
    optimizer.register_step_pre_hook(lambda *a: met.append("before"))
    optimizer.register_step_post_hook(lambda *a: met.append("after"))
    loss = optimizer.step(lambda: met.append("closure") or backward(model))
    assert met == ["before", "closure", "after"] and loss.requires_grad
    assert optimizer.step() is None
    assert optimizer.grad_norm is None


def test_nothing_to_do(kernels):
    optimizer = ft.optim.AdamW(network().parameters(), max_grad_norm=1.0)
    optimizer.step()
    assert not optimizer.state and optimizer.grad_norm is None


@pytest.mark.smoke
def test_a_graph_notices_the_step(kernels):
    """Autograd's version counters move, as they do under torch's optimizers."""
    model = network()
    optimizer = ft.optim.AdamW(model.parameters())
    loss = model(torch.randn(8, 13)).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_grad_scaler(kernels, max_norm, unscaled):
    """Scaled gradients give the step of plain ones; a step with an infinity is none."""
    model, plain = network(), network()
    ours = ft.optim.AdamW(model.parameters(), max_grad_norm=max_norm)
    theirs = ft.optim.AdamW(plain.parameters(), max_grad_norm=max_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(5):
        model.zero_grad()
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean()).backward()
        if step == 3:
            model[0].weight.grad[2, 3] = math.inf
        if unscaled:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if step != 3:
            backward(plain, step)
            theirs.step()
    assert_equal(model, plain)
    assert ours.state[model[0].weight]["step"] == 4
    if max_norm is not None:
        assert torch.equal(ours.grad_norm, theirs.grad_norm)


# ---- What the kernels leave to torch


def mixed():
    """Parameters for the kernels and for torch, with gradients."""
    sizes = (5, torch.float32), (70, torch.bfloat16), (9, torch.float64), (3, torch.complex64)
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n, dtype in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.smoke
def test_a_mixed_group_has_one_norm(kernels):
    params = mixed()
    same = copy.deepcopy(params)
    for p, q in zip(params, same, strict=True):
        q.grad = p.grad.clone()
    optimizer, stock = ft.optim.AdamW(params, max_grad_norm=0.3), torch.optim.AdamW(same)
    total = torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g
                       for g in (p.grad.to(torch.complex128 if p.is_complex() else torch.float64)
                                 for p in params)]).norm()  # fmt: skip
    for _ in range(2):
        with backends.record() as calls:
            optimizer.step()
        for q, p in zip(same, params, strict=True):
            q.grad = (p.grad * (0.3 / (total + 1e-6))).to(q.dtype)
        stock.step()
        torch.testing.assert_close(optimizer.grad_norm.double(), total, rtol=1e-6, atol=0)
    first, second = calls
    assert (first.backend, first.reasons) == ("cpu", {})
    assert second.backend == "reference"
    assert second.reasons == {"cpu": "dtype float64, dtype complex64"}
    for p, q in zip(params, same, strict=True):
        torch.testing.assert_close(
            p, q, rtol=1e-2 if p.dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


def test_all_of_it_torchs(kernels):
    params = [nn.Parameter(torch.randn(4, 5, dtype=torch.float64))]
    same = copy.deepcopy(params)
    optimizer, stock = ft.optim.AdamW(params, max_grad_norm=0.3), torch.optim.AdamW(same)
    for _ in range(3):
        params[0].grad = torch.randn_like(params[0])
        same[0].grad = params[0].grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(same, 0.3)
        optimizer.step()
        stock.step()
        assert torch.equal(optimizer.grad_norm, norm)
    torch.testing.assert_close(params[0], same[0], rtol=0, atol=0)


def test_strict_and_forced(kernels):
    params = mixed()
    before = [p.detach().clone() for p in params]
    optimizer = ft.optim.AdamW(params, max_grad_norm=1.0)
    message = "strict mode forbids the reference backend (cpu: dtype float64, dtype complex64)"
    with ft.strict(), pytest.raises(RuntimeError, match=re.escape(f"adamw: {message}")):
        optimizer.step()
    with ft.backend("cpu"), pytest.raises(RuntimeError, match="the cpu backend was asked for"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    with ft.backend("reference"), backends.record() as calls:
        optimizer.step()
    assert {call.backend for call in calls} == {"reference"}
    assert not any(map(torch.equal, params, before))
    with ft.strict():
        ft.optim.AdamW(params[:2]).step()


def test_forced_after_a_group_was_taken(kernels):
    model = network()
    optimizer = ft.optim.AdamW(model.parameters())
    train(model, optimizer)
    with ft.backend("reference"), backends.record() as calls:
        train(model, optimizer, 1)
    assert [call.backend for call in calls] == ["reference"]


def test_options_that_are_torchs(kernels):
    model, stock = network(), network()
    ours = ft.optim.AdamW(model.parameters(), fused=True)
    theirs = torch.optim.AdamW(stock.parameters(), fused=True)
    with ft.backend("reference"):
        train(model, ours)
    train(stock, theirs)
    assert_equal(model, stock)

    x = torch.randn(4, requires_grad=True)
    p = (x * 2).clone()
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = ft.optim.AdamW([p], lr=lr, differentiable=True, max_grad_norm=0.1)
    p.grad = (x * x).clone()
    with backends.record() as calls:
        optimizer.step()
    assert calls[0].reasons == {"cpu": "differentiable=True"}
    found = torch.autograd.grad(p.sum(), (x, lr))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found)

    other = nn.Parameter(torch.randn(3))
    other.grad = torch.randn(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ft.optim.AdamW([other], max_grad_norm=1.0).step()


def test_shared_memory_is_not_raced_for(kernels):
    memory = torch.randn(50_000)
    params = [nn.Parameter(memory), nn.Parameter(memory[10:40_000])]
    optimizer = ft.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with backends.record() as calls:
        optimizer.step()
    assert calls[1].reasons == {"cpu": "memory that two parameters share"}


@pytest.mark.parametrize("max_norm", [None, 10.0])
def test_tensors_that_change_under_their_names(kernels, max_norm):
    """A group that was taken is looked at again when it does not fit any more."""
    model, stock = network(), network()
    ours = ft.optim.AdamW(model.parameters(), max_grad_norm=max_norm)
    theirs = torch.optim.AdamW(stock.parameters())

    def steps(change=lambda net: None):
        with backends.record() as calls:
            for net, optimizer in ((model, ours), (stock, theirs)):
                backward(net)
                change(net)
                optimizer.step()
        assert_same(model, stock, rtol=1e-5, atol=1e-6)
        return [call.backend for call in calls]

    def transpose_gradient(net):
        net[0].weight.grad = net[0].weight.grad.t().contiguous().t()

    def transpose_weight(net):
        net[3].weight.data = net[3].weight.data.t().contiguous().t()

    def restore_weight(net):
        net[3].weight.data = net[3].weight.data.contiguous()

    def widen(net):
        net.double()
        states = (ours if net is model else theirs).state.values()
        for p, own in zip(net.parameters(), states, strict=True):
            p.grad = p.grad.double()
            own.update({name: x.double() for name, x in own.items() if name != "step"})

    assert steps() == steps() == ["cpu"]
    assert steps(transpose_gradient)[-2:] == ["cpu", "reference"]
    assert steps() == ["cpu"]
    assert steps(transpose_weight)[-2:] == ["cpu", "reference"]
    steps(restore_weight)  # after backward, which made its gradient like the weight before
    assert steps() == ["cpu"]
    assert steps(widen)[-1:] == ["reference"]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1.0, ValueError, "AdamW: max_grad_norm is -1.0; it must be at least 0."),
        (math.nan, ValueError, "AdamW: max_grad_norm is nan; it must be at least 0."),
        ("1", TypeError, "AdamW: max_grad_norm must be a number or None, got str."),
        (True, TypeError, "AdamW: max_grad_norm must be a number or None, got bool."),
    ],
)
def test_errors(value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ft.optim.AdamW(network().parameters(), max_grad_norm=value)


def test_under_the_compiler(kernels):
    """The step runs eagerly behind a graph break, on the kernels."""
    model, plain = network(), network()
    ours, theirs = (ft.optim.AdamW(m.parameters(), max_grad_norm=0.1) for m in (model, plain))
    step = torch.compile(lambda: ours.step(), backend="eager")
    for seed in range(4):
        backward(model, seed)
        backward(plain, seed)
        with backends.record() as calls:
            step()
        theirs.step()
        assert [call.backend for call in calls] == ["cpu"]
    assert_equal(model, plain)
