"""output_hidden_states and output_attentions of accelerated models; compiling and tracing them."""

import pytest
import torch
from small_models import MASKS, build, ids, pair, real

import fast_transformer as ft
from fast_transformer.backends import record


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
def test_hidden_states(backend, mask, how):
    stock, fast = pair(output_hidden_states=how == "config")
    wanted = {"output_hidden_states": True} if how == "argument" else {}
    tokens, mask = ids(), MASKS[mask]()
    keep = real(mask)
    expected, found = (m(tokens, mask, **wanted).hidden_states for m in (stock, fast))
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[keep], b[keep], atol=1e-5, rtol=1e-5)
    with record() as calls:
        fast(tokens, mask, output_hidden_states=False)
    assert {c.op for c in calls} >= {"mlp", "attention" if keep.all() else "attention_varlen"}


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("mask", ["none", "right", "holes"])
def test_attention_weights(mask, how):
    stock, fast = pair(impl="eager", output_attentions=how == "config")
    wanted = {"output_attentions": True} if how == "argument" else {}
    tokens, mask = ids(), MASKS[mask]()
    keep = real(mask)
    expected, found = (m(tokens, mask, **wanted) for m in (stock, fast))
    assert len(found.attentions) == len(expected.attentions) == 2
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    a, b = (x.last_hidden_state[keep] for x in (found, expected))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_tuples_instead_of_objects():
    stock, fast = pair()
    tokens, mask = ids(), MASKS["right"]()
    expected, found = (m(tokens, mask, return_dict=False) for m in (stock, fast))
    assert isinstance(found, tuple) and len(found) == len(expected)
    torch.testing.assert_close(found[0][real(mask)], expected[0][real(mask)], atol=1e-5, rtol=1e-5)


def test_causal_calls_stay_stock():
    """A call with is_causal takes the stock path, and is right."""
    stock, fast = pair()
    tokens = ids()
    expected, found = (m(tokens, is_causal=True).last_hidden_state for m in (stock, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["none", "right", "holes", "empty sample"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_compiled(backend, impl, mask):
    """Without a graph break; padding is computed there, and is zero at the end all the same."""
    torch._dynamo.reset()
    _, fast = pair(impl=impl)
    tokens, mask = ids(), MASKS[mask]()
    keep = real(mask)
    with torch.no_grad():
        expected = fast(tokens, mask).last_hidden_state
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        found = compiled(tokens, mask).last_hidden_state
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert not found[~keep].any()


def test_compiled_training(backend):
    torch._dynamo.reset()
    _, fast = pair(add_pooling_layer=False)
    fast.train()
    tokens, mask = ids(), MASKS["right"]()
    grads = []
    for model in (fast, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        fast.zero_grad()
        model(tokens, mask).last_hidden_state[real(mask)].square().sum().backward()
        grads.append(fast.encoder.layer[0].intermediate.dense.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-4)


@pytest.mark.full
def test_compiled_by_inductor(cpu):
    torch._dynamo.reset()
    _, fast = pair()
    tokens, mask = ids(), MASKS["right"]()
    with torch.no_grad():
        expected = fast(tokens, mask).last_hidden_state
        found = torch.compile(fast, fullgraph=True)(tokens, mask).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
def test_a_traced_model_serves_other_masks():
    """Tracing must not bake the first mask's padding into the graph."""
    stock = build(return_dict=False)
    fast = ft.accelerate(build(return_dict=False))
    fast.load_state_dict(stock.state_dict())
    tokens = ids()
    with ft.backend("reference"), torch.no_grad():
        short = MASKS["right"]() * (torch.arange(13) < 6)
        traced = torch.jit.trace(fast, (tokens, short), check_trace=False)
        for mask in (MASKS["left"](), MASKS["holes"]()):
            keep = real(mask)
            expected = stock(tokens, mask)[0][keep]
            torch.testing.assert_close(
                traced(tokens, mask)[0][keep], expected, atol=1e-5, rtol=1e-5
            )


def test_exported(backend):
    _, fast = pair()
    tokens, mask = ids(), MASKS["right"]()
    with torch.no_grad():
        program = torch.export.export(fast, (tokens, mask))
        for other in (mask, MASKS["holes"]()):
            keep = real(other)
            expected = fast(tokens, other).last_hidden_state
            found = program.module()(tokens, other).last_hidden_state
            torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
            assert not found[~keep].any()
