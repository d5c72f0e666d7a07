"""The embedding layers of the BERT family, accelerated."""

import pytest
import torch
from small_models import FAMILIES, build, ids, pair
from torch import nn

import fast_transformer as ft
from fast_transformer.backends import record

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def run(embeddings, *inputs, **kwargs):
    """(states, gradients of every parameter, ops that ran)."""
    embeddings.zero_grad()
    with record() as calls:
        out = embeddings(*inputs, **kwargs)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    grads = {name: p.grad for name, p in embeddings.named_parameters()}
    return out.detach(), grads, [call.op for call in calls]


def assert_same(stock, fast, *inputs, ops=("embedding_norm",), **kwargs):
    out, grads, _ = run(stock.embeddings, *inputs, **kwargs)
    found, found_grads, called = run(fast.embeddings, *inputs, **kwargs)
    torch.testing.assert_close(found, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_grads, grads, atol=1e-5, rtol=1e-4)
    assert tuple(called) == ops


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients(backend, family):
    stock, fast = pair(family, type_vocab_size=3)
    tokens = ids()
    tokens[1, 7:] = tokens[2, 1:] = stock.config.pad_token_id
    types = torch.randint(0, 3, tokens.shape)
    positions = torch.randint(0, 30, tokens.shape)
    for given in ({}, {"token_type_ids": types}, {"position_ids": positions[:1]},
                  {"position_ids": positions, "token_type_ids": types}):  # fmt: skip
        assert_same(stock, fast, tokens, **given)


def test_what_only_the_stock_layer_does(backend):
    stock, fast = pair()
    assert_same(stock, fast, inputs_embeds=torch.randn(4, 13, 32), ops=("layer_norm",))
    assert_same(stock, fast, ids(), cache_length=5, ops=("layer_norm",))


@pytest.mark.parametrize("name", [*TABLES, "LayerNorm", "dropout"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_hooks_of_children_fire(cpu, family, name):
    stock, fast = pair(family)
    seen = []
    for model in (stock, fast):
        child = model.embeddings.get_submodule(name)
        child.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    fused = name == "word_embeddings"
    stepwise = ("layer_norm",)
    assert_same(stock, fast, ids(), ops=("embedding_norm",) if fused else stepwise)
    assert len(seen) == 2 and seen[0] == seen[1]
    ((where, what),) = ft.explain(fast).costs
    assert where == f"embeddings.{name}" and "has hooks: " in what
    assert ("called as a module" in what) == fused


def test_a_replaced_table_is_called(cpu):
    class Doubled(nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    stock, fast = pair()
    for model in (stock, fast):
        twice = Doubled(60, 32)
        twice.load_state_dict(stock.embeddings.word_embeddings.state_dict())
        model.embeddings.word_embeddings = twice
    assert_same(stock, fast, ids())
    assert ft.explain(fast).costs == (
        ("embeddings.word_embeddings", "is Doubled: called as a module"),
    )


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq"])
def test_options_of_tables(cpu, option):
    stock, fast = pair()
    for model in (stock, fast):
        setattr(model.embeddings.position_embeddings, option, 1.0 if option == "max_norm" else True)
    assert_same(stock, fast, ids(), ops=("layer_norm",))


def test_a_larger_vocabulary(cpu):
    stock, fast = pair()
    for model in (stock, fast):
        torch.manual_seed(0)
        model.resize_token_embeddings(70)
    assert_same(stock, fast, ids() + 10)


def test_an_id_out_of_range(backend):
    _, fast = pair()
    with pytest.raises(IndexError, match=r"input_ids holds 60; word has 60 rows"):
        fast(torch.tensor([[3, 60]]))


def test_self_check_keeps_what_disagrees(monkeypatch):
    from fast_transformer.integrations import embeddings, selfcheck

    monkeypatch.setattr(selfcheck, "_verdicts", {})
    right = embeddings.embedding_norm
    monkeypatch.setattr(embeddings, "embedding_norm", lambda *a, **k: right(*a, **k) * 1.01)
    model = build()
    with pytest.raises(RuntimeError, match="embeddings: self-check: differs by"):
        ft.accelerate(model, strict=True)
    ft.accelerate(model)
    assert type(model.embeddings).__module__.startswith("transformers.")
    assert type(model.embeddings.LayerNorm) is ft.nn.LayerNorm


def test_compiles_whole(backend):
    stock, fast = pair()
    compiled = torch.compile(fast.embeddings, fullgraph=True, backend="aot_eager")
    tokens = ids()
    torch.testing.assert_close(compiled(tokens), stock.embeddings(tokens), atol=1e-5, rtol=1e-5)
