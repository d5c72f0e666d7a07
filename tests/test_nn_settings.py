"""Settings that ft.nn's modules read off torch.nn's: eps, masks' forms, global hooks, tracing."""

import contextlib

import pytest
import torch
from module_parity import LAYER, B, C, T, check, encoders, layers, padding, src
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import fast_transformer as ft
from fast_transformer.backends import record

EPS = {"norm1": 0.3, "norm2": 2.0}  # apart from each other and from the default


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_each_norm_has_its_own_eps(backend, padded, norm_first):
    modules = encoders(LAYER | {"norm_first": norm_first}, 1, final_norm=True)
    for module in modules:
        module.norm.eps = 0.7
        for name, eps in EPS.items():
            getattr(module.layers[0], name).eps = eps
    drop = padding("right", B, T)
    options, keep = ({"src_key_padding_mask": drop}, ~drop) if padded else ({}, None)
    check(*modules, {"src": src()}, ["src"], torch.float32, options, keep)


@pytest.mark.parametrize("lowest", [-torch.inf, -1e9, torch.finfo(torch.float32).min])
def test_finite_numbers_in_a_padding_mask_are_added(backend, lowest):
    """Only zeros and −inf alone say what is a token; here every row is one, and as torch's."""
    modules = encoders(LAYER)
    mask = torch.randn(B, T).masked_fill(padding("right", B, T), lowest)
    keep = mask != -torch.inf
    check(
        *modules, {"src": src()}, ["src"], torch.float32, {"src_key_padding_mask": mask}, keep
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["attn_mask", "key_padding_mask"])
def test_a_float_mask_may_have_another_dtype(backend, which, dtype):
    ours = ft.nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12)
    # numbers that every dtype holds, so that the cast costs nothing
    mask = torch.randint(-4, 5, (5, 5) if which == "attn_mask" else (2, 5)) / 4
    expected = ours(x, x, x, **{which: mask})
    torch.testing.assert_close(ours(x, x, x, **{which: mask.to(dtype)}), expected)
    assert not torch.allclose(ours(x, x, x)[0], expected[0])


@pytest.mark.parametrize("when", ["forward", "full backward"])
def test_a_hook_on_the_activation_alone_fires(backend, when):
    stock, ours = layers(activation="gelu")
    x, heard = src(), []
    for module in (stock, ours):
        module.activation = nn.GELU()  # one each
        hook = lambda *args, module=module: heard.append(module)  # noqa: E731
        if when == "forward":
            module.activation.register_forward_hook(hook)
        else:
            module.activation.register_full_backward_hook(hook)
    found, expected = (m(x).square().sum() for m in (ours, stock))
    for y in (expected, found):
        y.backward()
    assert heard.count(stock) == heard.count(ours) == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm_first", [True, False])
def test_global_hooks_see_every_child(backend, norm_first):
    """As those of FLOP counters and profilers do; without them the children are fused again."""
    stock, ours = encoders(LAYER | {"norm_first": norm_first}, final_norm=True)
    x, options = src(), {"src_key_padding_mask": padding("right", B, T)}
    expected = ours(x, **options)
    seen = {}
    for module in (stock, ours):
        names = {m: name for name, m in module.named_modules()}
        called = seen[module] = []
        with contextlib.closing(Hook(lambda m, *_, n=names, c=called: c.append(n.get(m)))):
            found = module(x, **options)
    assert set(seen[stock]) <= set(seen[ours])  # torch.nn itself does not call self_attn.out_proj
    assert {name for name in names.values() if name != "layers"} == set(seen[ours])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with record() as calls:
        ours(x, **options)
    assert "add_norm" in {c.op for c in calls}


class Hook:
    """A global forward hook, until closed."""

    def __init__(self, function):
        self.close = register_module_forward_hook(function).remove


class Padded(nn.Module):
    """An encoder with its two inputs in a row, as torch.jit.trace and vmap give them."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, drop):
        return self.encoder(x, src_key_padding_mask=drop)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_does_not_remember_the_mask():
    _, ours = encoders(LAYER)
    module = Padded(ours.eval())
    nowhere = torch.zeros(B, T, dtype=torch.bool)
    for first, then in ((nowhere, "right"), (padding("left", B, T), "holes")):
        traced = torch.jit.trace(module, (src(), first), check_trace=False)
        x, drop = torch.randn(B, T, C), padding(then, B, T)
        torch.testing.assert_close(traced(x, drop), module(x, drop), rtol=1e-4, atol=1e-5)


def test_vmap_over_masks():
    _, ours = encoders(LAYER)
    module = Padded(ours.eval())
    x = torch.randn(3, B, T, C)
    drops = torch.stack([padding(kind, B, T) for kind in ("right", "left", "holes")])
    found = torch.func.vmap(module)(x, drops)
    for i in range(3):
        torch.testing.assert_close(found[i], module(x[i], drops[i]), rtol=1e-4, atol=1e-5)
