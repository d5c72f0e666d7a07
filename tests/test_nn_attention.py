"""ft.nn.MultiheadAttention beside torch.nn's."""

import contextlib
import copy
import pickle

import pytest
import torch
from module_parity import added, causal, check, masks, padding, twins
from torch import nn

import fast_transformer as ft
from fast_transformer.backends import record

LOW = (torch.float32, torch.bfloat16)
SHAPES = [(1, 1, 1, 3, 1), (3, 7, 7, 12, 3), (2, 5, 9, 20, 4), (1, 65, 63, 34, 2)]  # B, T, S, E, H
CONFIGS = {
    "plain": {},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "both-added": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 7},
    "vdim-no-bias": {"vdim": 9, "bias": False},
    "everything": {"kdim": 7, "vdim": 9, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS = (
    "none right right-float left left-float holes holes-float causal bool float bool-3d float-3d "
    "causal+right bool+holes float+right-float float+holes bool-3d+right float-3d+left-float"
).split()


def case(shape, batch_first=True, **config):
    """Both modules and the leaves of a cross-attention."""
    B, T, S, E, H = shape
    modules = twins("MultiheadAttention", E, H, batch_first=batch_first, **config)
    widths = {"query": (T, E), "key": (S, modules[0].kdim), "value": (S, modules[0].vdim)}
    order = (lambda n, c: (B, n, c)) if batch_first else (lambda n, c: (n, B, c))
    return modules, {name: torch.randn(order(*size)) for name, size in widths.items()}


QKV, SELF = ("query", "key", "value"), ("query", "query", "query")
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_float64(shape, batch_first, config, need_weights):
    modules, leaves = case(shape, batch_first, **CONFIGS[config])
    check(*modules, leaves, QKV, torch.float64, {"need_weights": need_weights})


@pytest.mark.parametrize("config", ["plain", "both-added"])
@pytest.mark.parametrize("weights", [None, "averaged", "by head"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_in_float64(mask, weights, config):
    B, T, S, _, H = shape = (3, 5, 9, 12, 3)
    modules, leaves = case(shape, **CONFIGS[config])
    options = masks(mask, B, H, T, S)
    options |= {
        "need_weights": weights is not None,
        "average_attn_weights": weights == "averaged",
    }
    if config == "both-added" and not options["need_weights"]:
        options.pop("is_causal", None)  # torch hides the added keys then, and not with weights
    check(*modules, leaves, QKV, torch.float64, options)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hint_leaves_added_keys_visible(need_weights):
    (_, ours), leaves = case((2, 7, 7, 12, 3), **CONFIGS["both-added"])
    options = {"attn_mask": causal(7), "need_weights": need_weights}
    found = [ours(**leaves, **options, is_causal=hint)[0] for hint in (True, False)]
    assert torch.equal(*found)


def test_causal_hint_is_believed(backend):
    (_, ours), leaves = case((2, 7, 7, 12, 3))
    unread = torch.full((7, 7), torch.nan)
    found = ours(**leaves, attn_mask=unread, is_causal=True)
    torch.testing.assert_close(found, ours(**leaves, attn_mask=causal(7)))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend, mask, dtype):
    B, T, S, E, H = shape = (3, 13, 17, 24, 3)
    modules, leaves = case(shape)
    check(*modules, leaves, QKV, dtype, masks(mask, B, H, T, S) | {"need_weights": False})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_configurations(backend, batch_first, config, dtype):
    modules, leaves = case((2, 9, 11, 20, 4), batch_first, **CONFIGS[config])
    check(*modules, leaves, QKV, dtype, {"key_padding_mask": padding("right", 2, 11)})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("positional", [SELF, ("query", "key", "key")], ids=["self", "key-value"])
@pytest.mark.parametrize("shape", [(2, 63, 63, 34, 2), (1, 77, 77, 80, 1)], ids=str)
def test_shared_inputs(backend, shape, positional, dtype):
    modules, leaves = case(shape)
    leaves = {name: leaves[name] for name in dict.fromkeys(positional)}
    check(*modules, leaves, positional, dtype, {"need_weights": False})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "right", "holes-float", "bool", "float-3d", "causal"])
def test_unbatched(mask, batch_first):
    modules, leaves = case((1, 7, 7, 12, 3), batch_first, add_bias_kv=True)
    leaves = {name: x.squeeze(0 if batch_first else 1) for name, x in leaves.items()}
    options = masks(mask, 1, 3, 7, 7)
    options |= {"average_attn_weights": False}
    if "key_padding_mask" in options:
        options["key_padding_mask"] = padding("right", 3, 7)[2]
    check(*modules, leaves, QKV, torch.float64, options)


def test_non_contiguous_inputs(backend):
    (stock, ours), leaves = case((3, 7, 9, 12, 3))
    wide = {n: torch.randn(*x.shape[:2], 2 * x.shape[2])[..., ::2] for n, x in leaves.items()}
    wide["key"] = wide["key"].transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(ours(*wide.values())[0], stock(*wide.values())[0])


@pytest.mark.parametrize("shape", [(0, 3, 3, 8, 2), (2, 0, 3, 8, 2)], ids=str)
def test_empty(backend, shape):
    (_, ours), leaves = case(shape)
    out, weights = ours(**leaves)
    assert out.shape == leaves["query"].shape and weights.shape == (shape[0], shape[1], shape[2])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("how", ["padding", "padding-float", "attn_mask", "left+causal"])
def test_rows_without_keys(backend, how, need_weights):
    B, T, E, H = 2, 6, 12, 3
    (stock, ours), _ = case((B, T, T, E, H))
    x = torch.randn(B, T, E, requires_grad=True)
    drop = torch.zeros(B, T, dtype=torch.bool)
    dead = torch.zeros(B, T, dtype=torch.bool)
    options = {"need_weights": need_weights}
    if how.startswith("padding"):
        drop[1] = dead[1] = True
        options["key_padding_mask"] = added(drop) if "float" in how else drop
    elif how == "attn_mask":
        forbidden = torch.zeros(T, T, dtype=torch.bool)
        forbidden[2] = True
        dead[:, 2] = True
        options["attn_mask"] = forbidden
    else:
        drop[1, :3] = dead[1, :3] = True
        options |= {"key_padding_mask": drop, "attn_mask": causal(T), "is_causal": True}
    out, weights = ours(x, x, x, **options)
    expected = stock(x, x, x, **options)[0]
    assert torch.equal(out[dead], ours.out_proj.bias.expand_as(out[dead]))
    torch.testing.assert_close(out[~dead], expected[~dead])
    if need_weights:
        assert torch.equal(weights[dead], torch.zeros_like(weights[dead]))
        torch.testing.assert_close(weights.sum(-1)[~dead], torch.ones_like(weights[~dead][:, 0]))
        out = out + weights.square().sum()
    grads = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
    assert all(bool(g.isfinite().all()) for g in grads) and bool(grads[0].any())


@pytest.mark.parametrize("end", ["right", "left"])
def test_padded_keys_are_not_read(backend, end):
    (_, ours), leaves = case((3, 7, 9, 12, 3))
    drop = padding(end, 3, 9)
    options = {"key_padding_mask": drop, "need_weights": False}
    expected = ours(**leaves, **options)[0]
    leaves |= {n: leaves[n].masked_fill(drop[..., None], torch.nan) for n in ("key", "value")}
    assert torch.equal(ours(**leaves, **options)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("config", ["plain", "both-added"])
def test_dropout(dtype, config):
    B, T, S, E, H = shape = (2, 33, 40, 12, 3)
    (_, ours), leaves = case(shape, dropout=0.4, **CONFIGS[config])
    ours, leaves = ours.to(dtype), {n: x.to(dtype) for n, x in leaves.items()}
    drop = padding("right", B, S)

    def call(**options):
        torch.manual_seed(11)
        return ours(**leaves, key_padding_mask=drop, average_attn_weights=False, **options)

    out, weights = call()
    assert torch.equal(call()[0], out)
    torch.testing.assert_close(call(need_weights=False)[0], out)
    torch.manual_seed(12)
    assert not torch.equal(ours(**leaves, key_padding_mask=drop)[0], out)
    seen = weights[..., :1]
    zeros = (weights[0] == 0).double().mean().item()
    assert 0.35 < zeros < 0.45 and seen.max() <= 1 / 0.6 + 1e-5
    # the weights that are returned are those that made the output
    value = leaves["value"] @ ours.in_proj_weight[2 * E :].T + ours.in_proj_bias[2 * E :]
    if config == "both-added":
        value = torch.cat([value, ours.bias_v.expand(B, 1, E), value.new_zeros(B, 1, E)], 1)
    value = value.view(B, -1, H, E // H).transpose(1, 2)
    remade = ours.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(remade, out, rtol=1e-5, atol=1e-5)
    ours.eval()
    assert torch.equal(call()[0], call()[0]) and not torch.equal(call()[0], out)


def test_dropped_weights_have_gradients():
    """Through output and weights, against finite differences with the same mask."""
    (_, ours), leaves = case((1, 3, 4, 4, 2), dropout=0.3)
    ours = ours.double()

    def call(query, key, value):
        torch.manual_seed(3)
        return ours(query, key, value)

    leaves = [x.double().requires_grad_() for x in leaves.values()]
    assert torch.autograd.gradcheck(call, leaves)


def test_float_mask_has_a_gradient():
    (stock, ours), leaves = case((2, 5, 6, 12, 3))
    grads = []
    for module in (stock, ours):
        mask = torch.linspace(-2, 2, 30).view(5, 6).requires_grad_()
        module(**leaves, attn_mask=mask)[0].square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autograd", ["train", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("mask", ["none", "right", "bool"])
def test_kernels_run(cpu, autograd, mask):
    (_, ours), _ = case((2, 5, 5, 12, 3))
    ours.train(autograd == "train")
    x = torch.randn(2, 5, 12)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(autograd, contextlib.nullcontext)(), record() as calls:
        ours(x, x, x, **masks(mask, 2, 3, 5, 5))
    assert [(c.op, c.backend) for c in calls] == [
        ("qkv_projection", "cpu"), ("attention", "cpu"), ("linear_act", "cpu")
    ]  # fmt: skip


def test_autocast(cpu):
    (stock, ours), leaves = case((2, 9, 11, 24, 3), add_bias_kv=True)
    with torch.autocast("cpu", torch.bfloat16), record() as calls:
        out, weights = ours(**leaves)
        expected = stock(**leaves)[0]
    assert out.dtype == expected.dtype == torch.bfloat16 and calls
    exact = stock.double()(**{n: x.double() for n, x in leaves.items()})
    error, theirs = ((x - exact[0]).abs().max() for x in (out, expected))
    assert error <= 2 * theirs + torch.finfo(torch.bfloat16).eps * exact[0].abs().max()
    torch.testing.assert_close(weights.double(), exact[1], rtol=0.05, atol=0.01)


def test_compile(cpu):
    (_, ours), leaves = case((2, 5, 7, 12, 3))
    drop = padding("right", 2, 7)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for options in ({}, {"key_padding_mask": drop, "need_weights": False}):
        expected = ours(**leaves, **options)[0]
        torch.testing.assert_close(compiled(**leaves, **options)[0], expected)


def test_child_with_hooks_or_another_class_is_called(cpu):
    (stock, ours), leaves = case((2, 5, 7, 12, 3))
    expected = stock(**leaves)[0]
    seen = []
    hook = ours.out_proj.register_forward_hook(lambda m, args, out: seen.append(out))
    out = ours(**leaves)[0]
    torch.testing.assert_close(out, expected)
    assert len(seen) == 1 and torch.equal(seen[0], out)
    hook.remove()

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    ours.out_proj = Doubled(ours.out_proj)
    torch.testing.assert_close(ours(**leaves)[0], 2 * expected)


def test_reassigned_projection(cpu):
    (stock, ours), leaves = case((2, 5, 7, 12, 3))
    for module in (stock, ours):
        module.in_proj_weight = nn.Parameter(module.in_proj_weight.detach() * 2)
        module.in_proj_bias = nn.Parameter(module.in_proj_bias.detach() - 1)
    torch.testing.assert_close(ours(**leaves)[0], stock(**leaves)[0])


@pytest.mark.parametrize("config", CONFIGS)
def test_state_and_copies(config):
    (stock, ours), leaves = case((2, 5, 7, 12, 3), **CONFIGS[config])
    assert isinstance(ours, nn.MultiheadAttention) and repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    fresh = nn.MultiheadAttention(12, 3, batch_first=True, **CONFIGS[config])
    fresh.load_state_dict(ours.state_dict(), strict=True)
    expected = ours(**leaves)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is ft.nn.MultiheadAttention
        assert torch.equal(other(**leaves)[0], expected)
    torch.testing.assert_close(fresh(**leaves)[0], expected)


def test_initialisation_is_torchs():
    made = []
    for source in (nn, ft.nn):
        torch.manual_seed(4)
        made.append(source.MultiheadAttention(12, 3, add_bias_kv=True, kdim=5).state_dict())
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_class_set_on_a_stock_instance(cpu):
    (stock, _), leaves = case((2, 5, 7, 12, 3))
    expected, before = stock(**leaves)[0], dict(vars(stock))
    assert ft.nn.MultiheadAttention.unsupported(stock) is None
    stock.__class__ = ft.nn.MultiheadAttention
    with record() as calls:
        torch.testing.assert_close(stock(**leaves)[0], expected)
    assert "attention" in [c.op for c in calls]
    stock.__class__ = nn.MultiheadAttention
    assert vars(stock) == before and torch.equal(stock(**leaves)[0], expected)


def test_meta():
    ours = ft.nn.MultiheadAttention(12, 3, device="meta", dtype=torch.bfloat16, batch_first=True)
    x = torch.empty(2, 5, 12, device="meta", dtype=torch.bfloat16)
    mask = torch.empty(2, 5, device="meta", dtype=torch.bool)
    out, weights = ours(x, x, x, key_padding_mask=mask)
    assert out.shape == x.shape and weights.shape == (2, 5, 5) and out.dtype == x.dtype


def test_nested():
    stock, ours = (m.eval() for m in twins("MultiheadAttention", 12, 2, batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(5, 12)])
    with torch.no_grad():
        expected, found = (m(x, x, x, need_weights=False)[0] for m in (stock, ours))
    assert len(found.unbind()) == 2
    for a, b in zip(expected.unbind(), found.unbind(), strict=True):
        torch.testing.assert_close(b, a)


ERRORS = [
    (ValueError, {"query": (2, 5, 13)}, {}, r"query has shape \(2, 5, 13\).* 12\)"),
    (ValueError, {"key": (2, 7, 13)}, {}, r"key has shape \(2, 7, 13\)"),
    (ValueError, {"key": (7, 12), "value": (7, 12)}, {}, r"key has shape \(7, 12\)"),
    (ValueError, {"value": (2, 8, 12)}, {}, r"value has shape \(2, 8, 12\) but key has \(2, 7"),
    (ValueError, {"query": (3, 5, 12)}, {}, r"key has batch 2 but query has 3"),
    (ValueError, {}, {"key_padding_mask": torch.ones(7, 2).bool()}, r"key_padding_mask.*\(7, 2\)"),
    (ValueError, {}, {"attn_mask": torch.ones(7, 5).bool()}, r"attn_mask.*\(7, 5\).*\(6, 5, 7\)"),
    (ValueError, {}, {"attn_mask": torch.ones(2, 5, 7)}, r"attn_mask has shape \(2, 5, 7\)"),
    (TypeError, {}, {"attn_mask": torch.ones(5, 7).long()}, r"attn_mask has dtype int64"),
    (TypeError, {}, {"key_padding_mask": torch.ones(2, 7).int()}, r"key_padding_mask.*int32"),
    (ValueError, {}, {"is_causal": True}, r"is_causal.*attn_mask"),
]


@pytest.mark.parametrize("kind, shapes, options, message", ERRORS, ids=lambda x: "")
def test_errors(kind, shapes, options, message):
    (_, ours), leaves = case((2, 5, 7, 12, 3))
    leaves |= {name: torch.randn(shape) for name, shape in shapes.items()}
    with pytest.raises(kind, match="^MultiheadAttention: " + message):
        ours(**leaves, **options)
