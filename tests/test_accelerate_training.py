"""Accelerated models in training: gradients, dropout, checkpointing, optimizers, tied weights."""

import copy

import pytest
import torch
from small_models import MASKS, B, T, build, ids, pair, real

import fast_transformer as ft
from fast_transformer.backends import record


def gradients(model, tokens, mask, weights):
    model.zero_grad()
    out = model(tokens, mask).last_hidden_state
    (out * weights)[real(mask)].sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes", "empty sample"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_of_every_parameter(backend, mode, mask):
    stock, fast = pair(add_pooling_layer=False)
    getattr(stock, mode)(), getattr(fast, mode)()
    tokens, mask = ids(), MASKS[mask]()
    weights = torch.randn(*tokens.shape, 32)
    expected = gradients(stock, tokens, mask, weights)
    found = gradients(fast, tokens, mask, weights)
    assert found.keys() == expected.keys() and len(found) > 30
    for name in expected:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            found[name], expected[name], atol=1e-4 * max(scale, 1.0), rtol=1e-4, msg=name
        )


def test_gradients_in_float64():
    stock, fast = pair(dtype=torch.float64, impl="eager")
    tokens, mask = ids(), MASKS["holes"]()
    weights = torch.randn(*tokens.shape, 32, dtype=torch.float64)
    expected = gradients(stock.train(), tokens, mask, weights)
    found = gradients(fast.train(), tokens, mask, weights)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-10, rtol=1e-9, msg=name)


def test_dropout_is_seeded_and_acts(backend):
    _, fast = pair(dropout=0.3)
    fast.train()
    tokens, mask = ids(), MASKS["right"]()

    def run(seed):
        torch.manual_seed(seed)
        return fast(tokens, mask).last_hidden_state

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-2)
    fast.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("option", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_acts(option, mask):
    _, fast = pair(**{option: 0.5})
    x, mask = torch.randn(B, T, 32), MASKS[mask]()  # past the dropout of the embeddings
    encoder = fast.train().encoder
    first, second = (encoder(x, mask).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_packed_tokens_meet_the_same_attention_dropout(backend):
    """As padded ones: where a token stands in its sequence decides, not where it is packed."""
    _, fast = pair(attention_probs_dropout_prob=0.4)
    fast.train()
    results = []
    for hook in (None, lambda *args: None):
        if hook is not None:  # the hook keeps the encoder from packing
            fast.encoder.layer[0].register_forward_hook(hook)
        torch.manual_seed(1)
        x, mask = torch.ones(B, T, 32).cumsum(1).sin(), MASKS["right"]()
        results.append(fast.encoder(x, mask).last_hidden_state)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_the_scale_of_the_module_is_used(backend):
    stock, fast = pair()
    tokens, keep = ids(), real(MASKS["right"]())
    for model in (stock, fast):
        model.encoder.layer[0].attention.self.scaling = 0.01
    for mask in (None, MASKS["right"]()):
        expected, found = (m(tokens, mask).last_hidden_state[keep] for m in (stock, fast))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(backend, reentrant):
    _, plain = pair(dropout=0.2)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tokens, mask = ids(), MASKS["right"]()
    weights = torch.randn(*tokens.shape, 32)
    results, calls = [], []
    for model in (plain.train(), checkpointed.train()):
        torch.manual_seed(5)
        with record() as recorded:
            results.append(gradients(model, tokens, mask, weights))
        calls.append(sum(call.op == "attention_varlen" for call in recorded))
    assert calls == [2, 4]  # the second time in backward
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], msg=name)


def test_an_optimizer_made_before_still_works(backend):
    model = build(add_pooling_layer=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    ft.accelerate(model)
    model(ids(), MASKS["right"]()).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert not torch.equal(
        before["encoder.layer.0.intermediate.dense.weight"],
        model.state_dict()["encoder.layer.0.intermediate.dense.weight"],
    )


def test_training_stays_together(backend):
    """Ten steps of masked language modelling, stock and accelerated."""
    stock, fast = pair(head="ForMaskedLM")
    tokens, mask = ids(), MASKS["right"]()
    labels = tokens.masked_fill(~real(mask), -100)
    losses = []
    for model in (stock.train(), fast.train()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = []
        for _ in range(10):
            loss = model(tokens, mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_tied_weights_stay_tied():
    model = build(head="ForMaskedLM")
    words = model.bert.embeddings.word_embeddings.weight
    ft.accelerate(model)
    assert model.cls.predictions.decoder.weight is words
    assert model.bert.embeddings.word_embeddings.weight is words


def test_frozen_parameters_get_no_gradient(backend):
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1.output" in name)
    ft.accelerate(model)
    model(ids(), MASKS["right"]()).last_hidden_state.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("layer.1.output" in name), name
