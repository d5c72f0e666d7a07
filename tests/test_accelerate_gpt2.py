"""GPT-2, accelerated: the outputs and gradients of the stock model, for every mask and head."""

import copy
import pickle

import pytest
import torch
from small_gpt2 import HEADS, LAYERS, B, T, build, counted, pair
from small_models import MASKS, ids
from torch import nn

import fast_transformer as ft

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
ONE_PASS = {"attention": LAYERS, "linear_act": 2 * LAYERS, "mlp": LAYERS, "add_norm": 2 * LAYERS}


def plain_dict(ops):
    return {op: n for op, n in ops.items() if op != "layer_norm"}


@pytest.mark.smoke
@pytest.mark.parametrize("mask", ["none", "full", "right", "left", "holes", "empty sample", "bool"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_every_mask(backend, impl, mask):
    """Rows of padding too are what they are in the stock model, but for those that see no key."""
    stock, fast = pair(impl=impl)
    tokens, mask = ids(), MASKS[mask]()
    seen = torch.ones(B, T).bool() if mask is None else mask.cumsum(1) > 0
    with torch.no_grad():
        expected = stock(tokens, attention_mask=mask).logits
        found, ops, backends = counted(fast, tokens, attention_mask=mask)
    torch.testing.assert_close(found.logits[seen], expected[seen], **CLOSE)
    assert plain_dict(ops) == ONE_PASS and backends == {backend}


def test_no_mask_of_length_by_length(cpu, monkeypatch):
    from fast_transformer.integrations import gpt2

    biases, attention = [], gpt2.ops.attention

    def spy(*args, bias=None, **kwargs):
        biases.append(bias)
        return attention(*args, bias=bias, **kwargs)

    monkeypatch.setattr(gpt2.ops, "attention", spy)
    _, fast = pair()
    for name, mask in MASKS.items():
        if name[0] != "4":
            biases.clear()
            fast(ids(), attention_mask=mask())
            assert all(b is None or b.shape == (B, 1, 1, T) for b in biases), name
            assert all(b is None for b in biases) or name in ("holes", "empty sample"), name


@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("head", HEADS)
def test_heads(cpu, head, mask):
    stock, fast = pair(head)
    tokens, mask = ids(), MASKS[mask]()
    if head == "DoubleHeadsModel":
        tokens = tokens[:, None].expand(B, 2, T).contiguous()
        mask = None if mask is None else mask[:, None].expand(B, 2, T).contiguous()
    with torch.no_grad():
        expected = stock(tokens, attention_mask=mask)
        found, ops, _ = counted(fast, tokens, attention_mask=mask)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, **CLOSE)
    assert plain_dict(ops) == ONE_PASS


def gradients(model, tokens, mask):
    model.zero_grad()
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_loss_and_gradients_of_every_parameter(backend, mode, mask):
    stock, fast = pair()
    getattr(stock, mode)(), getattr(fast, mode)()
    tokens, mask = ids(), MASKS[mask]()
    loss, expected = gradients(stock, tokens, mask)
    own, found = gradients(fast, tokens, mask)
    torch.testing.assert_close(own, loss, **CLOSE)
    assert found.keys() == expected.keys() and len(found) > 20
    for name in expected:
        scale = max(1.0, expected[name].abs().max().item())
        assert found[name].stride() == expected[name].stride(), name
        torch.testing.assert_close(
            found[name], expected[name], atol=1e-5 * scale, rtol=1e-4, msg=name
        )


def test_float64():
    stock, fast = pair(dtype=torch.float64)
    tokens = ids()
    loss, expected = gradients(stock.train(), tokens, None)
    own, found = gradients(fast.train(), tokens, None)
    torch.testing.assert_close(own, loss, atol=1e-12, rtol=1e-12)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-10, rtol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_stock(cpu, dtype):
    stock, fast = pair(dtype=dtype)
    exact, tokens = copy.deepcopy(stock).double(), ids()
    with torch.no_grad():
        truth, plain, found = (m(tokens).logits.double() for m in (exact, stock, fast))
    eps = torch.finfo(dtype).eps
    assert (found - truth).abs().max() <= (
        2 * (plain - truth).abs().max() + eps * truth.abs().max()
    )


def test_autocast(cpu):
    stock, fast = pair()
    tokens = ids()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = stock(tokens).logits
        found, ops, _ = counted(fast, tokens)
    assert found.logits.dtype == expected.dtype and plain_dict(ops) == ONE_PASS
    torch.testing.assert_close(found.logits.float(), expected.float(), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("option", ["attn_pdrop", "resid_pdrop", "embd_pdrop"])
def test_each_dropout_acts_and_is_seeded(backend, option):
    _, fast = pair(**{option: 0.4})
    tokens = ids()

    def run(seed):
        torch.manual_seed(seed)
        return fast(tokens).logits

    fast.train()
    assert torch.equal(run(1), run(1)) and not torch.allclose(run(1), run(2), atol=1e-2)
    fast.eval()
    assert torch.equal(run(1), run(2))


def test_dropout_is_in_the_kernels(cpu, monkeypatch):
    _, fast = pair(dropout=0.3)
    monkeypatch.setattr(nn.Dropout, "forward", lambda *args: pytest.fail("a dropout was called"))
    loss, ops, _ = counted(lambda: fast.train()(ids(), labels=ids()).loss)
    loss.backward()
    assert plain_dict(ops) == ONE_PASS | {"add_norm": 2 * LAYERS + 1}  # one for the embeddings


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(cpu, reentrant):
    _, plain = pair(dropout=0.2)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tokens, results = ids(), []
    for model, passes in ((plain, 1), (checkpointed, 2)):
        torch.manual_seed(5)
        grads, ops, _ = counted(gradients, model.train(), tokens, MASKS["right"]())
        assert ops["attention"] == passes * LAYERS  # the second time in backward
        results.append(grads)
    (loss, expected), (own, found) = results
    torch.testing.assert_close(own, loss)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "mish"},
        {"tie_word_embeddings": False},
    ],
    ids=lambda o: next(iter(o)) + str(next(iter(o.values()))),
)
def test_configurations(cpu, options):
    stock, fast = pair(impl="eager", **options)
    tokens = ids()
    with torch.no_grad():
        expected = stock(tokens).logits
        found, ops, _ = counted(fast, tokens)
    torch.testing.assert_close(found.logits, expected, atol=5e-5, rtol=1e-4)
    assert ops["mlp"] == (0 if options.get("activation_function") == "mish" else LAYERS)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_what_a_call_asks_for(cpu, impl):
    """Hidden states, weights, tuples, positions, token types, embeddings, a mask of 4-D."""
    stock, fast = pair(impl=impl)
    tokens = ids()
    causal = torch.ones(T, T).tril().bool().expand(B, 1, T, T).clone()
    causal[:, :, 5:, 1] = False
    if impl == "eager":
        causal = torch.zeros(B, 1, T, T).masked_fill(~causal, torch.finfo(torch.float32).min)
    packed = torch.cat([torch.arange(7), torch.arange(T - 7)])[None].expand(B, T)
    for asked in (
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"use_cache": False},
        {"position_ids": packed},
        {"position_ids": torch.arange(T)[None] + 3, "attention_mask": torch.ones(B, T)},
        {"token_type_ids": ids()},
        {"attention_mask": causal},
        {"logits_to_keep": 3},
        {"labels": tokens},
    ):
        with torch.no_grad():
            expected, found = stock(tokens, **asked), fast(tokens, **asked)
        if isinstance(expected, tuple):
            assert isinstance(found, tuple) and len(found) == len(expected)
            expected, found = {"logits": expected[0]}, {"logits": found[0]}
        assert list(found) == list(expected), asked
        for name, value in expected.items():
            values = value if isinstance(value, tuple) else (value,)
            others = found[name] if isinstance(value, tuple) else (found[name],)
            assert len(values) == len(others)
            for x, y in zip(others, values, strict=True):
                if isinstance(y, torch.Tensor):
                    torch.testing.assert_close(x, y, **CLOSE, msg=f"{asked}, {name}")
    x = torch.randn(B, T, 32)
    with torch.no_grad():
        expected, found = (m(inputs_embeds=x).logits for m in (stock, fast))
    torch.testing.assert_close(found, expected, **CLOSE)


PLACES = ["", "ln_1", "attn", "attn.c_attn", "attn.c_proj", "attn.resid_dropout", "ln_2", "mlp",
          "mlp.c_fc", "mlp.act", "mlp.c_proj", "mlp.dropout"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_fire_once_and_see_the_stock_shapes(cpu, kind, place):
    stock, fast = pair()
    tokens, noted, outputs = ids(), [], []
    for model in (stock, fast):
        seen, module = [], model.transformer.h[1].get_submodule(place)
        if kind == "forward":
            handle = module.register_forward_hook(
                lambda m, args, out, seen=seen: seen.append([tuple(a.shape) for a in args[:1]])
            )
        else:
            handle = module.register_full_backward_hook(
                lambda m, gin, gout, seen=seen: seen.append(gout[0].shape)
            )
        out, ops, _ = counted(model, tokens)
        out.logits.square().sum().backward()
        noted.append(seen)
        outputs.append(out.logits)
        handle.remove()
    assert len(noted[0]) == 1 and noted[1] == noted[0]
    assert ops["attention"] >= LAYERS - 1
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert plain_dict(counted(fast, tokens)[1]) == ONE_PASS  # the hook is gone, so is its cost


class Lora(nn.Module):
    """A low-rank adapter around a Conv1D, as peft puts it in the place of a child."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.nx, 2, bias=False)
        self.up = nn.Linear(2, base.nf, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("place", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_adapters_act_and_are_told(cpu, place):
    stock, fast = pair()
    parent, _, name = place.partition(".")
    for model in (stock, fast):
        torch.manual_seed(2)
        owner = getattr(model.transformer.h[1], parent)
        setattr(owner, name, Lora(getattr(owner, name)))
    tokens = ids()
    torch.testing.assert_close(fast(tokens).logits, stock(tokens).logits, **CLOSE)
    assert any(place in child for child, _ in ft.explain(fast).costs)


def test_parameters_files_and_restore(tmp_path):
    model = build()
    kinds, before = [type(m) for m in model.modules()], dict(model.named_parameters())
    model.save_pretrained(tmp_path / "stock")
    ft.accelerate(model)
    assert all(p is before[n] for n, p in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    model.save_pretrained(tmp_path / "fast")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    ft.restore(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not counted(model, ids())[1]


def test_copies_and_pickles(cpu):
    _, fast = pair()
    tokens = ids()
    expected = fast(tokens).logits
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        found, ops, _ = counted(other, tokens)
        assert torch.equal(found.logits, expected) and plain_dict(ops) == ONE_PASS
        assert not counted(ft.restore(other), tokens)[1]


def test_explain_and_what_stays(cpu):
    _, fast = pair()
    report = ft.explain(fast, ids())
    assert ("transformer", "GPT2Model") in report.swapped and not report.stayed
    assert report.calls["attention", "cpu"] == LAYERS and not report.costs
    crossed = build(add_cross_attention=True)
    with pytest.raises(RuntimeError, match="cross-attention"):
        ft.accelerate(crossed, strict=True)
    ft.accelerate(crossed)
    states = torch.randn(B, 5, 32)
    assert crossed(ids(), encoder_hidden_states=states).logits.shape == (B, T, 60)
    assert ft.explain(crossed).stayed


def test_self_check_finds_a_block_that_disagrees():
    from transformers.models.gpt2 import modeling_gpt2

    model = build()
    model.transformer.h[0].attn.split_size = 32
    model.transformer.h[0].attn.scaling = 1.0  # the module's own scale is used: still the same
    ft.accelerate(model, strict=True)
    assert type(ft.restore(model).transformer.h[0]) is modeling_gpt2.GPT2Block


def test_compile(cpu):
    stock, fast = pair()
    tokens, mask = ids(), MASKS["left"]()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for m in (None, mask):
            expected = stock(tokens, attention_mask=m, use_cache=False).logits
            found = compiled(tokens, attention_mask=m, use_cache=False).logits
            seen = torch.ones(B, T).bool() if m is None else m.cumsum(1) > 0
            torch.testing.assert_close(found[seen], expected[seen], **CLOSE)
    expected = {}
    for model, run in ((stock, stock), (fast, compiled)):
        run(tokens, use_cache=False).logits.square().mean().backward()
        expected = expected or {n: p.grad for n, p in model.named_parameters()}
    for name, parameter in fast.named_parameters():
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-5 * scale, rtol=1e-4, msg=name
        )
