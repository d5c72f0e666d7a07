"""The RMS norms of transformers, accelerated: outputs, classes, what stays stock."""

import copy
import os
import pickle

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import fast_transformer as ft
from fast_transformer.accuracy import assert_close_to_reference
from fast_transformer.backends import record

transformers = pytest.importorskip("transformers")

CLASSES = {
    "llama": "LlamaRMSNorm",
    "mistral": "MistralRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "t5": "T5LayerNorm",
}
SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
SMALL_T5 = {"vocab_size": 60, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
# each of two layers has two norms, Qwen3's two more on queries and keys; and one at the end
MODELS = {"Llama": 5, "Mistral": 5, "Qwen2": 5, "Qwen3": 9, "T5": 5}


def stock_norm(family, width=40):
    module = getattr(transformers.models, family)
    kind = getattr(getattr(module, f"modeling_{family}"), CLASSES[family])
    norm = kind(width, eps=1e-5)
    torch.nn.init.normal_(norm.weight, mean=1.0)
    return norm


def model(family):
    config = getattr(transformers, f"{family}Config")(**(SMALL_T5 if family == "T5" else SMALL))
    kind = (
        transformers.T5EncoderModel if family == "T5" else getattr(transformers, f"{family}Model")
    )
    return kind._from_config(config).eval()


def results(module, x, dtype):
    module = copy.deepcopy(module).to(dtype)
    x = x.to(dtype).requires_grad_()
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
    dx, dweight = torch.autograd.grad(out, [x, module.weight], weights)
    return {"0": out.detach(), "dx": dx, "dweight": dweight}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CLASSES)
def test_error_within_twice_the_stock_norms(backend, family, dtype):
    """Which rounds between the norm and the product with weight; the fused op does not."""
    stock = stock_norm(family).to(dtype)
    fast = ft.accelerate(copy.deepcopy(stock))
    assert isinstance(fast, type(stock)) and type(fast) is not type(stock)
    x = torch.randn(7, 40).to(dtype)
    with record() as calls:
        found = results(fast, x, dtype)
    assert [c.op for c in calls] == ["rms_norm"]
    with ft.backend("reference"):  # stock ones take the mean in float32 whatever the input
        exact = results(fast, x, torch.float64)
    assert_close_to_reference(found, results(stock, x, dtype), exact)


@pytest.mark.parametrize("family", MODELS)
def test_models(cpu, family):
    stock = model(family)
    fast = ft.accelerate(copy.deepcopy(stock))
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad(), record() as calls:
        found = fast(ids).last_hidden_state
    torch.testing.assert_close(found, stock(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert [c.op for c in calls] == ["rms_norm"] * MODELS[family]
    explained = ft.explain(fast)
    assert len(explained.swapped) == MODELS[family] and not explained.stayed
    ft.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("family", CLASSES)
def test_copies_and_pickles(family):
    fast = ft.accelerate(stock_norm(family))
    x = torch.randn(3, 40)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is type(fast) and torch.equal(other(x), fast(x))


@pytest.mark.parametrize("family", CLASSES)
def test_two_dtypes_are_stock(family):
    """The result then has a dtype that depends on the family."""
    stock = stock_norm(family)
    fast = ft.accelerate(copy.deepcopy(stock))
    x = torch.randn(3, 40).bfloat16()
    with record() as calls:
        found = fast(x)
    assert found.dtype == stock(x).dtype and torch.equal(found, stock(x)) and not calls


def test_other_norms_stay():
    class Mine(type(stock_norm("llama"))):
        def forward(self, x):
            return x

    net = torch.nn.Sequential(Mine(8))
    with pytest.warns(UserWarning, match="Mine|nothing to accelerate"):
        ft.accelerate(net)
    assert type(net[0]) is Mine
    from fast_transformer.integrations import rms

    assert not hasattr(rms, "GemmaRMSNorm")
