"""torch.nn's modules, accelerated: the outputs of the stock ones, and their classes back."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fast_transformer as ft
from fast_transformer.backends import record

B, T, C = 3, 9, 32


def encoder(layers=2, norm=True, dtype=torch.float32, **options):
    options = {"dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(C, 4, 48, **options)
    last = nn.LayerNorm(C) if norm else None
    model = nn.TransformerEncoder(layer, layers, norm=last, enable_nested_tensor=False).to(dtype)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def padding():
    return torch.arange(T) >= torch.tensor([T, 5, 2])[:, None]


OPTIONS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "no bias": {"bias": False},
    "length first": {"batch_first": False},
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("options", OPTIONS)
def test_encoder(backend, options, padded, mode):
    stock = encoder(**OPTIONS[options]).train(mode == "train")
    fast = ft.accelerate(copy.deepcopy(stock))
    assert isinstance(fast, ft.nn.TransformerEncoder)
    x, pad = torch.randn(B, T, C), padding() if padded else None
    keep = torch.ones(B, T, dtype=torch.bool) if pad is None else ~pad
    first = OPTIONS[options].get("batch_first", True)
    with torch.set_grad_enabled(mode != "no_grad"):
        inputs = x if first else x.transpose(0, 1)
        expected = stock(inputs, src_key_padding_mask=pad)
        with record() as calls:
            found = fast(inputs, src_key_padding_mask=pad)
    if not first:
        expected, found = expected.transpose(0, 1), found.transpose(0, 1)
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert not found[~keep].any()
    assert sum(c.op.startswith("attention") for c in calls) == 2
    assert {"mlp"} <= {c.op for c in calls}


def test_gradients_of_an_encoder(backend):
    stock = encoder().train()
    fast = ft.accelerate(copy.deepcopy(stock))
    x, keep = torch.randn(B, T, C), ~padding()
    for model in (stock, fast):
        model(x, src_key_padding_mask=~keep)[keep].square().sum().backward()
    for (name, a), b in zip(stock.named_parameters(), fast.parameters(), strict=True):
        scale = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4 * max(1.0, scale), rtol=1e-4, msg=name)


def test_nested_tensors_are_not_handed_to_our_layers(backend):
    """The stock encoder turns padded batches into nested tensors in its fast path."""
    layer = nn.TransformerEncoderLayer(C, 4, 48, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    fast = ft.accelerate(copy.deepcopy(stock))
    x, keep = torch.randn(B, T, C), ~padding()
    with torch.no_grad():
        expected = stock(x, src_key_padding_mask=~keep)
        found = fast(x, src_key_padding_mask=~keep)
    assert found.shape[0] == B and not found.is_nested
    torch.testing.assert_close(
        found[:, : expected.shape[1]][keep[:, : expected.shape[1]]],
        expected[keep[:, : expected.shape[1]]], atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_a_stock_encoder_around_our_layers(backend):
    """A subclass of the encoder stays, its layers go, and it hands them no nested tensor."""

    class Mine(nn.TransformerEncoder):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + 1

    layer = nn.TransformerEncoderLayer(C, 4, 48, batch_first=True)
    stock = Mine(layer, 2, enable_nested_tensor=True).eval()
    fast = ft.accelerate(copy.deepcopy(stock))
    assert type(fast) is Mine and isinstance(fast.layers[0], ft.nn.TransformerEncoderLayer)
    assert stock.use_nested_tensor and not fast.use_nested_tensor
    x, keep = torch.randn(B, T, C), ~padding()
    with torch.no_grad():
        expected = stock(x, src_key_padding_mask=~keep)
        found = fast(x, src_key_padding_mask=~keep)
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert "Mine: a subclass of TransformerEncoder" in str(ft.explain(fast))
    ft.restore(fast)
    assert vars(fast).keys() == vars(stock).keys()
    assert fast.use_nested_tensor == stock.use_nested_tensor


def test_layers_and_norms_by_themselves(backend):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(C, 4, batch_first=True)
            self.norm, self.rms = nn.LayerNorm(C), nn.RMSNorm(C)
            self.decoder = nn.TransformerDecoderLayer(C, 4, 48, dropout=0.0, batch_first=True)

        def forward(self, x):
            y = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
            return self.decoder(self.rms(y), x)

    stock = Net().eval()
    fast = ft.accelerate(copy.deepcopy(stock))
    x = torch.randn(B, T, C)
    with record() as calls:
        found = fast(x)
    torch.testing.assert_close(found, stock(x), atol=1e-5, rtol=1e-5)
    ops = [c.op for c in calls]
    assert ops.count("attention") == 3 and ops.count("layer_norm") == 4
    assert ops.count("rms_norm") == 1
    assert type(fast.decoder) is nn.TransformerDecoderLayer


def test_classes_come_back():
    stock = encoder()
    kinds = [type(m) for m in stock.modules()]
    keys = [sorted(vars(m)) for m in stock.modules()]
    fast = ft.accelerate(stock)
    assert [type(m) for m in fast.modules()] != kinds
    ft.restore(pickle.loads(pickle.dumps(fast)))
    ft.restore(fast)
    assert [type(m) for m in fast.modules()] == kinds
    assert [sorted(vars(m)) for m in fast.modules()] == keys


def test_modules_built_as_ours_stay_ours():
    model = ft.nn.LayerNorm(C)
    assert type(ft.restore(ft.accelerate(model))) is ft.nn.LayerNorm


def test_transformers_is_not_imported():
    program = (
        "import sys, torch, fast_transformer as ft\n"
        "layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)\n"
        "model = ft.accelerate(torch.nn.TransformerEncoder(layer, 1))\n"
        "ft.explain(model, torch.randn(1, 2, 8)); ft.restore(model)\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
