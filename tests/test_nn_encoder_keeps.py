"""What ft.nn's encoder keeps of torch.nn's: hooks, adapters, nesting, state, modes, errors."""

import copy
import pickle

import pytest
import torch
from module_parity import (
    LAYER,
    B,
    C,
    T,
    check,
    encoders,
    layers,
    padding,
    src,
    tokens,
)
from module_parity import encoder_masks as masks
from torch import nn

import fast_transformer as ft
from fast_transformer.backends import record


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("how", ["encoder", "layer", "attention hook", "layer hook"])
def test_nested(backend, layout, how):
    stock, ours = encoders(LAYER, final_norm=True)
    seen = []
    if "hook" in how:
        watched = ours.layers[0] if how == "layer hook" else ours.layers[0].self_attn
        watched.register_forward_hook(lambda *args: seen.append(args))
    parts = [torch.randn(n, C, requires_grad=True) for n in (4, 1, 7)]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    module, like = (ours.layers[0], stock.layers[0]) if how == "layer" else (ours, stock)
    out = module(nested)
    assert out.is_nested and out.layout == layout and bool(seen) == ("hook" in how)
    for part, found in zip(parts, out.unbind(), strict=True):
        expected = like(part[None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(y.square().sum(), part, retain_graph=True) for y in
                 (found, expected)]  # fmt: skip
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    if layout == torch.jagged:
        assert (out + nested).shape == nested.shape


CHILDREN = ["self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2", "dropout",
            "dropout1", "dropout2"]  # fmt: skip


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("child", CHILDREN)
def test_hooks_on_children_fire(backend, child, norm_first):
    stock, ours = encoders(LAYER | {"norm_first": norm_first})
    options = masks("right")
    keep, x = tokens(options), src()
    heard = []
    for module in (stock, ours):
        watched, events = module.layers[1].get_submodule(child), []
        watched.register_forward_pre_hook(lambda *_, e=events: e.append("pre"))
        watched.register_forward_hook(lambda *_, e=events: e.append("forward"))
        watched.register_full_backward_hook(lambda *_, e=events: e.append("backward"))
        out = module(x, **options)[keep]
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        heard.append((events, out, grads))
    assert heard[1][0] == ["pre", "forward", "backward"]
    assert heard[0][0] == ([] if child == "self_attn.out_proj" else heard[1][0])  # torch bypasses
    torch.testing.assert_close(heard[1][1:], heard[0][1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["norm", "layers.0", "layers.0.self_attn", "layers.0.linear1"])
def test_a_hook_sees_the_padded_batch(backend, where):
    _, ours = encoders(LAYER, final_norm=True)
    shapes = []
    ours.get_submodule(where).register_forward_pre_hook(
        lambda m, args: shapes.append(args[0].shape)
    )
    ours(src(), **masks("right"))
    assert shapes == [(B, T, C)]


def test_a_hook_that_changes_the_output_changes_it(backend):
    stock, ours = layers(activation=nn.GELU())
    x, expected = src(), None
    for child in ("linear1", "activation"):
        for module in (stock, ours):
            module.get_submodule(child).register_forward_hook(lambda m, args, out: out * 3)
        before, expected = expected, stock(x)
        torch.testing.assert_close(ours(x), expected)
        assert before is None or not torch.allclose(before, expected)


class Adapter(nn.Module):
    """What LoRA makes of a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.linspace(-0.1, 0.2, 2 * inner.in_features).view(2, -1))
        self.up = nn.Parameter(torch.linspace(-0.1, 0.2, 2 * inner.out_features).view(-1, 2))

    def forward(self, x):
        return self.inner(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("child", ["linear1", "linear2"])
@pytest.mark.parametrize("mask", ["none", "right"])
def test_replaced_child_is_called(backend, mask, child):
    stock, ours = encoders(LAYER)
    for module in (stock, ours):
        setattr(module.layers[0], child, Adapter(getattr(module.layers[0], child)))
    options = masks(mask)
    check(stock, ours, {"src": src()}, ["src"], torch.float32, options, tokens(options))


@pytest.mark.parametrize("mask", ["none", "right"])
def test_replaced_out_proj_is_called(backend, mask):
    """torch.nn's own attention reads its weight, so there the adapter is merged."""
    stock, ours = encoders(LAYER)
    attention = ours.layers[0].self_attn
    attention.out_proj = adapter = Adapter(attention.out_proj)
    x, options = src(), masks(mask)
    before = stock(x, **options)
    with torch.no_grad():
        stock.layers[0].self_attn.out_proj.weight += adapter.up @ adapter.down
    expected, keep = stock(x, **options), tokens(options)
    keep = torch.ones(B, T, dtype=torch.bool) if keep is None else keep
    found = ours(x, **options)
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before[keep], expected[keep], rtol=1e-2, atol=1e-2)
    assert all(bool(g.any()) for g in torch.autograd.grad(found.sum(), [adapter.up, adapter.down]))


def test_activation_of_a_subclass_keeps_its_forward():
    class Halved(nn.GELU):
        def forward(self, x):
            return super().forward(x) / 2

    stock, ours = layers(activation=Halved())
    x = src()
    torch.testing.assert_close(ours(x), stock(x))
    assert "Halved" in ft.nn.TransformerEncoderLayer.unsupported(stock)


def test_state_and_copies():
    stock, ours = encoders(LAYER, final_norm=True)
    assert isinstance(ours, nn.TransformerEncoder) and repr(ours) == repr(stock)
    assert isinstance(ours.layers[0], nn.TransformerEncoderLayer)
    assert list(ours.state_dict()) == list(stock.state_dict())
    x, options = src(), masks("holes")
    expected = ours(x, **options)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(other(x, **options), expected)
    fresh, _ = encoders(LAYER, final_norm=True)
    for p in fresh.parameters():
        p.data.zero_()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    keep = tokens(options)
    torch.testing.assert_close(fresh(x, **options)[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_classes_set_on_stock_instances(cpu):
    stock, _ = encoders(LAYER, final_norm=True)
    x, options = src(), masks("right")
    keep, kinds = tokens(options), {m: type(m) for m in stock.modules()}
    expected = stock(x, **options)
    for module, kind in kinds.items():
        module.__class__ = getattr(ft.nn, kind.__name__, kind)
    with record() as calls:
        found = stock(x, **options)
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-4, atol=1e-5)
    assert [c.op for c in calls].count("attention_varlen") == 2
    for module, kind in kinds.items():
        module.__class__ = kind
    assert torch.equal(stock(x, **options), expected)


@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("what", ["layer", "encoder"])
def test_compile(cpu, what, mask):
    _, encoder = encoders(LAYER, 1)
    module = encoder if what == "encoder" else encoder.layers[0]
    options, x = masks(mask), src()
    expected = module(x, **options)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(x, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = [
        torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (found, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast(cpu, norm_first, mask):
    stock, ours = encoders(LAYER | {"norm_first": norm_first})
    options, x = masks(mask), src()
    keep = tokens(options)
    outs = []
    for module in (stock, ours):
        with torch.autocast("cpu", torch.bfloat16), record() as calls:
            outs.append(module(x, **options))
        grads = torch.autograd.grad(outs[-1].float().square().sum(), list(module.parameters()))
        assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)
    assert {c.backend for c in calls} == {"cpu"} and outs[0].dtype == outs[1].dtype
    exact = stock.double()(x.double(), **options)
    if keep is not None:
        exact, outs = exact[keep], [y[keep] for y in outs]
    theirs, error = ((y - exact).abs().max() for y in outs)
    assert error <= 2 * theirs + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_meta():
    layer = ft.nn.TransformerEncoderLayer(**LAYER, device="meta", dtype=torch.bfloat16)
    encoder = ft.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.empty(B, T, C, device="meta", dtype=torch.bfloat16)
    drop = torch.empty(B, T, device="meta", dtype=torch.bool)
    out = encoder(x, src_key_padding_mask=drop)
    assert out.shape == x.shape and out.is_meta and out.dtype == x.dtype
    assert all(p.is_meta for p in encoder.parameters())


def bools(*shape):
    return torch.zeros(shape, dtype=torch.bool)


ERRORS = [
    (ValueError, (B, T, 17), {}, r"src has shape \(3, 11, 17\).*18\)"),
    (ValueError, (B, 1, T, C), {}, r"src has shape \(3, 1, 11, 18\)"),
    (ValueError, (B, T, C), {"MASK": bools(T, 9)}, r"MASK has shape \(11, 9\).*\(11, 11\)"),
    (ValueError, (B, T, C), {"MASK": bools(B, T, T)}, r"MASK has shape \(3, 11, 11\).*\(9, 11"),
    (TypeError, (B, T, C), {"MASK": bools(T, T).int()}, r"MASK has dtype int32"),
    (ValueError, (B, T, C), {"is_causal": True}, r"is_causal.*\bMASK\b"),
    (ValueError, (B, T, C), {"MASK": bools(4, 4), "is_causal": True}, r"MASK has shape \(4, 4\)"),
    (ValueError, (B, T, C), {"src_key_padding_mask": bools(T, B)},
     r"src_key_padding_mask has shape \(11, 3\).*\(3, 11\)"),
    (TypeError, (B, T, C), {"src_key_padding_mask": bools(B, T).long()},
     r"src_key_padding_mask has dtype int64"),
]  # fmt: skip


@pytest.mark.parametrize("what", ["layer", "encoder"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind, shape, options, message", ERRORS, ids=lambda x: "")
def test_errors(kind, shape, options, message, padded, what):
    _, encoder = encoders(LAYER)
    module, mask = (encoder, "mask") if what == "encoder" else (encoder.layers[0], "src_mask")
    options = {name.replace("MASK", mask): x for name, x in options.items()}
    if padded:
        options = {"src_key_padding_mask": padding("right", B, T)} | options
    message = f"^{type(module).__name__}: " + message.replace("MASK", mask)
    with pytest.raises(kind, match=message):
        module(torch.randn(shape), **options)


@pytest.mark.parametrize("what", ["layer", "encoder"])
def test_masks_of_nested_tensors_are_refused(what):
    _, encoder = encoders(LAYER)
    module = encoder if what == "encoder" else encoder.layers[0]
    nested = torch.nested.as_nested_tensor([torch.randn(3, C), torch.randn(5, C)])
    with pytest.raises(ValueError, match="src_key_padding_mask must be None where src is nested"):
        module(nested, src_key_padding_mask=bools(2, 5))


def test_unsupported_says_why():
    reason = ft.nn.TransformerEncoder.unsupported
    stock, ours = encoders(LAYER)
    assert reason(stock) is None and reason(ours) is None
    assert "tanh" in reason(encoders(LAYER | {"activation": torch.tanh})[0])
    stock.layers[1] = nn.Identity()
    assert "Identity" in reason(stock)
