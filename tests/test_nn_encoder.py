"""ft.nn.TransformerEncoderLayer and TransformerEncoder beside torch.nn's."""

import contextlib

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
from torch.nn import functional as F

from fast_transformer.backends import record

LOW = (torch.float32, torch.bfloat16)
ACTIVATIONS = ["relu", "gelu", F.relu, F.gelu, F.silu, nn.GELU("tanh"), nn.SiLU(), nn.ReLU()]
MODES = {
    "train": contextlib.nullcontext, "eval": contextlib.nullcontext,
    "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
}  # fmt: skip
POST = ["qkv_projection", "attention", "linear_act", "add_norm", "mlp", "add_norm"]
PRE = ["layer_norm", "qkv_projection", "attention", "linear_act", "add_norm", "mlp"]


MASKS = "none right right-float holes causal causal-float bool float-3d causal+right bool+holes"
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_layer_in_float64(norm_first, activation, bias, batch_first):
    config = {"norm_first": norm_first, "bias": bias, "batch_first": batch_first}
    modules = layers(activation=activation, **config)
    options = masks("right+bool")
    check(*modules, {"src": src(batch_first)}, ["src"], torch.float64, options, None)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", MASKS.split())
def test_layer(backend, mask, norm_first, dtype):
    modules = layers(norm_first=norm_first, activation="gelu")
    check(*modules, {"src": src()}, ["src"], dtype, masks(mask))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_layer_activations(backend, activation, dtype):
    modules = layers(activation=activation, bias=activation != "relu", batch_first=False)
    check(*modules, {"src": src(False)}, ["src"], dtype)


@pytest.mark.parametrize("mask", ["none", "causal", "float"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_unbatched(mask, norm_first):
    options = masks(mask)
    check(*layers(norm_first=norm_first), {"src": src()[0]}, ["src"], torch.float64, options)
    drop = padding("right", B, T)[2]
    stock, ours = encoders(LAYER | {"norm_first": norm_first})
    options = masks(mask, "mask") | {"src_key_padding_mask": drop}
    check(stock, ours, {"src": src()[0]}, ["src"], torch.float64, options, ~drop)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("mask", [*MASKS.split(), "left", "left-float"])
def test_encoder_in_float64(mask, final_norm, training):
    modules = [m.train(training) for m in encoders(LAYER, 3, final_norm)]
    options = masks(mask, "mask")
    check(*modules, {"src": src()}, ["src"], torch.float64, options, tokens(options))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "right", "left", "holes-float", "bool+holes"])
def test_encoder(backend, mask, norm_first, dtype):
    modules = encoders(LAYER | {"norm_first": norm_first, "activation": "gelu"}, 2, norm_first)
    options = masks(mask, "mask")
    check(*modules, {"src": src()}, ["src"], dtype, options, tokens(options))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 65, 40, 4), (5, 63, 33, 3)], ids=str)
def test_encoder_shapes(backend, shape):
    batch, length, width, heads = shape
    layer = LAYER | {"d_model": width, "nhead": heads, "dim_feedforward": 2 * width + 1}
    drop = padding("right", batch, length)
    x = torch.randn(length, batch, width)
    modules = encoders(layer | {"batch_first": False})
    options = {"src_key_padding_mask": drop}
    check(*modules, {"src": x}, ["src"], torch.float32, options, ~drop.T)


FALLBACK = {  # what keeps the encoder from packing
    "packed": lambda encoder: {},
    "mask": lambda encoder: {"mask": torch.zeros(T, T)},
    "hook": lambda encoder: {} if encoder.layers[1].linear1.register_forward_hook(nothing) else {},
    "norm hook": lambda encoder: {} if encoder.norm.register_forward_hook(nothing) else {},
}


def nothing(module, args, out):
    """A hook that changes nothing."""


@pytest.mark.parametrize("why", FALLBACK)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["right", "left-float", "holes"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_neither_read_nor_written(backend, training, kind, norm_first, why):
    stock, ours = encoders(LAYER | {"norm_first": norm_first}, final_norm=True)
    options = masks(kind) | FALLBACK[why](ours.train(training))
    keep = tokens(options)
    x = src()
    poisoned = x.masked_fill(~keep[..., None], torch.nan).requires_grad_()
    out = ours(poisoned, **options)
    assert torch.equal(out[~keep], torch.zeros_like(out[~keep]))
    x.requires_grad_()
    expected = stock(x, **options)
    torch.testing.assert_close(out[keep], expected[keep], rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(out)  # of padded rows too: nothing may come of it
    found = torch.autograd.grad(out, [poisoned, *ours.parameters()], cotangent)
    cotangent = cotangent.masked_fill(~keep[..., None], 0)
    sought = torch.autograd.grad(expected, [x, *stock.parameters()], cotangent)
    assert torch.equal(found[0][~keep], torch.zeros_like(found[0][~keep]))
    for a, b in zip(found, sought, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_sequences_that_are_padding_alone(backend):
    _, ours = encoders(LAYER, final_norm=True)
    for drop in (torch.tensor([[False] * T, [True] * T]), torch.ones(2, T, dtype=torch.bool)):
        x = torch.randn(2, T, C, requires_grad=True)
        out = ours(x, src_key_padding_mask=drop)
        assert not out[drop].any() and bool(out.isfinite().all())
        grads = torch.autograd.grad(out.sum() + out.square().sum(), [x, *ours.parameters()])
        assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "right", "holes", "bool", "causal", "causal+right"])
def test_kernels_run(cpu, mask, norm_first, mode):
    config = LAYER | {"norm_first": norm_first, "dropout": 0.1}
    _, ours = encoders(config, 2, norm_first)
    ours.train(mode == "train")
    once = PRE if norm_first else POST
    final = ["layer_norm"] if norm_first else []
    with MODES[mode]():
        with record() as calls:
            ours.layers[0](src(), **masks(mask))
        assert [c.op for c in calls] == once and {c.backend for c in calls} == {"cpu"}
        options = masks(mask, "mask")
        options.pop("is_causal", None)  # the encoder looks for itself
        with record() as calls:
            ours(src(), **options)
    if "right" in mask or mask == "holes":
        once = [{"attention": "attention_varlen"}.get(op, op) for op in once]
    assert [c.op for c in calls] == 2 * once + final and {c.backend for c in calls} == {"cpu"}


@pytest.mark.parametrize("mask", ["none", "right", "bool+holes"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_follows_the_seed(backend, norm_first, mask):
    _, ours = encoders(LAYER | {"dropout": 0.3, "norm_first": norm_first})
    x, options = src(), masks(mask, "mask")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(ours(x, **options))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    ours.eval()
    assert torch.equal(ours(x, **options), ours(x, **options))


def test_dropout_drops_in_every_place(backend):
    """With one of the four rates alone, the output still moves."""
    for place in ("dropout", "dropout1", "dropout2", "attention"):
        (_, ours), x = layers(), src()
        expected = ours(x)
        if place == "attention":
            ours.self_attn.dropout = 0.5
        else:
            getattr(ours, place).p = 0.5
        assert not torch.allclose(ours(x), expected), place
        assert torch.equal(ours.eval()(x), expected), place
