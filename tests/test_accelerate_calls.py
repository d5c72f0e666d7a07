"""Which ops an accelerated model runs, counted in every mode, and what hooks and adapters see."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from small_models import MASKS, B, T, build, ids, pair, real
from torch import nn

import fast_transformer as ft
from fast_transformer.backends import record

LAYERS = 2
MODES = {
    "train": (True, nullcontext),
    "eval": (False, nullcontext),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}


def counted(model, *inputs, **kwargs):
    with record() as calls:
        out = model(*inputs, **kwargs)
    return out, Counter(c.op for c in calls if c.op != "layer_norm"), {c.backend for c in calls}


@pytest.mark.parametrize("mask", ["none", "full", "right", "left"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_kernel_calls(cpu, impl, mode, mask):
    train, context = MODES[mode]
    _, fast = pair(impl=impl, dropout=0.1)
    fast.train(train)
    with context():
        _, ops, backends = counted(fast, ids(), MASKS[mask]())
    attention = "attention" if mask in ("none", "full") else "attention_varlen"
    assert ops == {
        "qkv_projection": LAYERS, attention: LAYERS, "linear_act": LAYERS, "mlp": LAYERS,
        "add_norm": 2 * LAYERS, "embedding_norm": 1,
    }  # fmt: skip
    assert backends == {"cpu"}


def test_padding_is_not_computed(monkeypatch):
    """The layers see as many rows as there are tokens."""
    seen = []
    from fast_transformer.integrations import bert

    plain_linear = bert.linear
    monkeypatch.setattr(bert, "linear", lambda m, x: seen.append(x.shape) or plain_linear(m, x))
    _, fast = pair()
    seen.clear()  # of the self-check
    mask = MASKS["holes"]()
    fast(ids(), mask)
    assert set(seen) == {(int(mask.sum()), 32)}


def with_hook(kind, module, seen):
    """Register a hook of one kind; it notes the shape that it sees."""
    if kind == "pre":
        return module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    if kind == "forward":
        return module.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    if kind == "backward":
        return module.register_full_backward_hook(lambda m, gin, gout: seen.append(gout[0].shape))
    return module.register_full_backward_pre_hook(lambda m, gout: seen.append(gout[0].shape))


PLACES = [
    "",
    "attention",
    "attention.self",
    "attention.self.query",
    "attention.self.value",
    "attention.output",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "attention.output.dropout",
    "intermediate",
    "intermediate.dense",
    "intermediate.intermediate_act_fn",
    "output",
    "output.dense",
    "output.LayerNorm",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["pre", "forward", "backward", "backward pre"])
def test_hooks_fire_once_and_see_the_stock_shapes(kind, place):
    stock, fast = pair()
    tokens, mask = ids(), MASKS["right"]()
    noted, outputs = [], []
    for model in (stock, fast):
        seen = []
        handle = with_hook(kind, model.encoder.layer[1].get_submodule(place), seen)
        out, ops, _ = counted(model, tokens, mask)
        out.last_hidden_state[real(mask)].square().sum().backward()
        noted.append(seen)
        outputs.append(out.last_hidden_state[real(mask)])
        handle.remove()
    assert len(noted[0]) == 1 and noted[1] == noted[0]
    assert ops["add_norm"], "nothing was fused at all"
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    assert counted(fast, tokens, mask)[1]["mlp"] == LAYERS  # the hook is gone, so is its cost


def test_a_hook_changes_the_output_as_in_the_stock_model():
    tokens, mask = ids(), MASKS["right"]()
    stock, fast = pair()
    for model in (stock, fast):
        query = model.encoder.layer[0].attention.self.query
        query.register_forward_hook(lambda m, args, out: out * 3)
    expected, found = (m(tokens, mask).last_hidden_state[real(mask)] for m in (stock, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_call_fires_hooks_of_the_encoder_and_the_model():
    _, fast = pair()
    seen = []
    for module in (fast, fast.encoder):
        module.register_forward_hook(lambda m, args, out: seen.append(out.last_hidden_state.shape))
    _, ops, _ = counted(fast, ids(), MASKS["right"]())
    assert seen == [(B, T, 32)] * 2
    assert ops["attention_varlen"] == LAYERS  # these see nothing of the packing


class Lora(nn.Module):
    """A low-rank adapter around a linear layer, as peft puts it in the place of a child."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "place", ["attention.self.query", "attention.output.dense", "intermediate.dense",
              "output.dense"],
)  # fmt: skip
def test_adapters_act(place, before):
    stock = build()
    fast = copy.deepcopy(stock)
    if not before:
        ft.accelerate(fast)
    parent, _, name = place.rpartition(".")
    for model in (stock, fast):
        torch.manual_seed(2)
        owner = model.encoder.layer[1].get_submodule(parent)
        setattr(owner, name, Lora(getattr(owner, name)))
    ft.accelerate(fast)
    tokens, mask = ids(), MASKS["right"]()
    expected = stock(tokens, mask).last_hidden_state[real(mask)]
    out, ops, _ = counted(fast, tokens, mask)
    found = out.last_hidden_state[real(mask)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert ops["attention_varlen"] == LAYERS
    for y in (expected, found):
        y.square().sum().backward()
    grads = [m.encoder.layer[1].get_submodule(place).up.weight.grad for m in (stock, fast)]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-4)


def test_parametrized_weights_act():
    stock, fast = pair()
    for model in (stock, fast):
        dense = model.encoder.layer[0].intermediate.dense
        nn.utils.parametrizations.weight_norm(dense)
        with torch.no_grad():
            dense.parametrizations.weight.original0.mul_(2.0)
    tokens = ids()
    expected, found = (m(tokens).last_hidden_state for m in (stock, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_forward_set_on_a_child_is_called():
    stock, fast = pair()
    for model in (stock, fast):
        dense = model.encoder.layer[0].output.dense
        dense.forward = lambda x, own=dense.forward: own(x) * 2
    tokens = ids()
    expected, found = (m(tokens).last_hidden_state for m in (stock, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
