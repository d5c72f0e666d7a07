"""What accelerate leaves alone: names, parameters, hooks, files; and what restore brings back."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from small_models import FAMILIES, MASKS, build, ids, pair, real
from torch import nn

import fast_transformer as ft
from fast_transformer.backends import record


def run(model, mask="right", **kwargs):
    torch.manual_seed(3)
    with torch.no_grad(), record() as calls:
        out = model(ids(), MASKS[mask](), **kwargs).last_hidden_state
    return out, [call.op for call in calls]


def classes(model):
    return [type(m) for m in model.modules()]


def state(model):
    """All that a module holds besides its children and tensors."""
    return [
        {k: v for k, v in vars(m).items() if not k.startswith("_")}
        | {"attributes": sorted(vars(m))}
        for m in model.modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_names_and_isinstance_stay(family):
    model = build(family)
    before, kinds = dict(model.named_parameters()), classes(model)
    buffers = dict(model.named_buffers())
    assert ft.accelerate(model) is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    assert all(b is buffers[n] for n, b in model.named_buffers())
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert type(model.encoder) is not kinds[-1] and model.encoder.__class__.__name__ in repr(model)


def test_restore_brings_everything_back():
    model = build()
    kinds, attributes, (expected, _) = classes(model), state(model), run(model)
    ft.accelerate(model)
    assert classes(model) != kinds and run(model)[1]
    assert ft.restore(model) is model
    assert classes(model) == kinds and state(model) == attributes
    found, ops = run(model)
    assert torch.equal(found, expected) and not ops


def test_twice_is_as_good_as_once():
    once = ft.accelerate(build())
    kinds, attributes = classes(once), state(once)
    ft.accelerate(once)
    assert classes(once) == kinds and state(once) == attributes
    ft.restore(ft.restore(once))
    assert not run(once)[1]


def test_accelerating_one_copy_leaves_the_other():
    model = build()
    other = copy.deepcopy(model)
    ft.accelerate(model)
    assert not run(other)[1] and run(model)[1]


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("journey", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta"])
def test_copies_are_accelerated_and_can_be_restored(family, journey):
    stock, fast = pair(family)
    found = journey(fast)
    assert torch.equal(run(found)[0], run(fast)[0]) and run(found)[1] == run(fast)[1]
    ft.restore(found)
    assert classes(found) == classes(stock) and torch.equal(run(found)[0], run(stock)[0])
    assert run(fast)[1], "restoring the copy changed the original"


def test_saved_files_are_those_of_the_stock_model(tmp_path):
    from transformers import AutoModel

    stock, fast = pair()
    for name, model in (("stock", stock), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    for file in sorted((tmp_path / "stock").iterdir()):
        other = tmp_path / "fast" / file.name
        assert other.read_bytes() == file.read_bytes(), file.name
    assert json.loads((tmp_path / "fast" / "config.json").read_text())["architectures"] == [
        "BertModel"
    ]
    loaded = AutoModel.from_pretrained(tmp_path / "fast").eval()
    assert torch.equal(run(loaded)[0], run(stock)[0])


def test_weights_loaded_later_are_used():
    _, fast = pair()
    other = build(initializer_range=0.1)
    assert list(fast.state_dict()) == list(other.state_dict())
    fast.load_state_dict(other.state_dict())
    keep = real(MASKS["right"]())
    torch.testing.assert_close(run(fast)[0][keep], run(other)[0][keep], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        fast.encoder.layer[0].attention.self.query.weight.data.mul_(3.0)  # seen by no version count
        other.encoder.layer[0].attention.self.query.weight.mul_(3.0)
    torch.testing.assert_close(run(fast)[0][keep], run(other)[0][keep], atol=1e-5, rtol=1e-5)


def test_initialising_again():
    stock, fast = pair()
    for model in (stock, fast):
        torch.manual_seed(7)
        model.apply(model._init_weights)
    for (name, a), b in zip(stock.named_parameters(), fast.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert run(fast)[1]


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_choosing_another_attention(impl):
    stock, fast = pair(impl="sdpa" if impl == "eager" else "eager")
    for model in (stock, fast):
        model.set_attn_implementation(impl)
    keep = real(MASKS["right"]())
    torch.testing.assert_close(run(fast)[0][keep], run(stock)[0][keep], atol=1e-5, rtol=1e-5)
    assert "attention_varlen" in run(fast)[1]


def test_changing_the_dtype(cpu):
    _, fast = pair()
    out, ops = run(fast.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and "attention_varlen" in ops


def test_on_the_meta_device():
    with torch.device("meta"):
        model = build()
    ft.accelerate(model)
    assert all(p.is_meta for p in model.parameters())
    out = model(torch.zeros(2, 5, dtype=torch.long, device="meta")).last_hidden_state
    assert out.is_meta and out.shape == (2, 5, 32)
    model.to_empty(device="cpu").load_state_dict(build().state_dict())
    model.embeddings.position_ids.copy_(torch.arange(40))
    model.embeddings.token_type_ids.zero_()
    assert run(model)[1]


def test_a_random_number_more_or_less():
    """Neither accelerate nor its self-check moves torch's generator, nor train and eval."""
    model = build(hidden_size=40, dropout=0.1).train()  # a configuration that no test checked yet
    model.encoder.layer[1].eval()
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    ft.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_what_is_no_module():
    for function in (ft.accelerate, ft.restore, ft.explain):
        with pytest.raises(TypeError, match="must be a torch.nn.Module, got dict"):
            function({})


def test_nothing_to_accelerate():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="nothing to accelerate: Sequential has no module of"):
        ft.accelerate(model)
    with pytest.raises(RuntimeError, match="nothing to accelerate"):
        ft.accelerate(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ft.accelerate(ft.accelerate(build()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_decoder": True}, "a decoder's"),
        ({"is_decoder": True, "add_cross_attention": True}, "a decoder's"),
        ({"chunk_size_feed_forward": 13}, "chunk_size_feed_forward is 13"),
    ],
)
def test_what_cannot_be_taken_over(options, reason):
    model = build(**options)
    kinds = classes(model)
    with pytest.raises(RuntimeError, match=f"encoder: .*{reason}.*encoder.layer.1: {reason}"):
        ft.accelerate(model, strict=True)
    assert classes(model) == kinds
    expected = model(ids()).last_hidden_state
    ft.accelerate(model)
    assert type(model.encoder) in kinds and type(model.encoder.layer[0]) in kinds
    assert reason in str(ft.explain(model))
    torch.manual_seed(0)
    assert model(ids()).last_hidden_state.shape == expected.shape


def test_one_strange_layer_stays_and_the_others_go():
    from transformers.models.bert.modeling_bert import BertLayer

    class Mine(BertLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) * 2

    stock, fast = build(num_hidden_layers=3), None
    stock.encoder.layer[1] = Mine(stock.config, layer_idx=1).eval()
    fast = ft.accelerate(copy.deepcopy(stock))
    assert [type(x).__module__.split(".")[0] for x in fast.encoder.layer] == [
        "fast_transformer", "test_accelerate_keeps", "fast_transformer",
    ]  # fmt: skip
    keep = real(MASKS["holes"]())
    expected, _ = run(stock, "holes")
    found, ops = run(fast, "holes")
    assert ops.count("attention") == 2
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert "layer.1 is Mine" in str(ft.explain(fast))
