"""What explain says: what was swapped, what stayed and why, what it costs, and what ran where."""

import pytest
import torch
from small_models import MASKS, build, ids, pair
from torch import nn

import fast_transformer as ft
from fast_transformer import backends


def test_report_of_a_whole_model(cpu):
    _, fast = pair(num_hidden_layers=3)
    report = ft.explain(fast, ids(), attention_mask=MASKS["right"]())
    assert ("encoder", "BertEncoder") in report.swapped
    assert report.calls["attention_varlen", "cpu"] == 3 and report.calls["mlp", "cpu"] == 3
    assert not report.stayed and not report.costs and not report.reasons
    lines = str(report).splitlines()
    assert lines[0] == f"BertModel: {len(report.swapped)} modules swapped, 0 stayed"
    assert ["encoder.layer.0-2", "BertLayer"] in [line.split() for line in lines]
    assert ["embeddings.LayerNorm", "LayerNorm"] in [line.split() for line in lines]
    assert any(line.split() == ["attention_varlen", "cpu", "×", "3"] for line in lines)
    assert "reference" not in str(report)


def test_without_inputs_nothing_runs():
    _, fast = pair()
    fast.register_forward_pre_hook(lambda m, args: pytest.fail("the model was called"))
    report = ft.explain(fast)
    assert report.calls is None and "calls" not in str(report)


def test_a_model_that_was_not_accelerated():
    report = ft.explain(build(), ids())
    assert report.calls == {} and not report.swapped
    assert "no op of ours" in str(report)
    assert "accelerate has not been called" in str(report)


def test_an_op_that_fell_to_the_reference_says_why(kernels):
    _, fast = pair(dtype=torch.float64)
    report = ft.explain(fast, ids())
    assert report.calls["mlp", "reference"] == 2
    assert ("mlp", "cpu", "dtype float64") in report.reasons
    assert "mlp, cpu" in str(report) and "dtype float64" in str(report)


def test_the_run_leaves_no_trace():
    _, fast = pair(dropout=0.5)
    fast.train()
    fast.encoder.layer[0].eval()
    tokens, modes = ids(), [m.training for m in fast.modules()]
    before = torch.get_rng_state()
    ft.explain(fast, tokens, MASKS["right"]())
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in fast.modules()] == modes
    assert all(p.grad is None for p in fast.parameters())
    with backends.record() as calls:
        pass
    assert not calls


def test_what_a_hook_costs():
    _, fast = pair()
    query = fast.encoder.layer[1].attention.self.query
    handle = query.register_forward_hook(lambda m, args, out: None)
    report = ft.explain(fast)
    ((name, what),) = report.costs
    assert name == "encoder.layer.1.attention.self.query"
    assert what == "Linear has hooks: called as a module; its encoder computes padding"
    assert f"{name}  {what}" in str(report)
    handle.remove()
    assert not ft.explain(fast).costs
    fast(ids(), output_hidden_states=True, output_attentions=False)  # transformers leaves hooks
    assert not ft.explain(fast).costs


def test_what_an_adapter_and_a_strange_activation_cost():
    class Adapter(nn.Linear):
        pass

    _, fast = pair(hidden_act="mish")
    fast.encoder.layer[0].output.dense = Adapter(48, 32)
    costs = dict(ft.explain(fast).costs)
    assert costs["encoder.layer.0.output.dense"] == "is Adapter: called as a module"
    assert "encoder.layer.0-1.intermediate.intermediate_act_fn" in str(ft.explain(fast))
    assert "MishActivation runs apart" in str(ft.explain(fast))


def test_costs_within_torchs_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = ft.accelerate(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert not ft.explain(model).costs
    model.layers[1].linear1.register_forward_hook(lambda m, args, out: None)
    costs = ft.explain(model).costs
    assert costs == (
        (
            "layers.1.linear1",
            "Linear has hooks: called as a module; its encoder computes padding",
        ),
    )


def test_an_activation_that_torchs_layer_has_not():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, activation=torch.sigmoid))
    with pytest.raises(RuntimeError, match="0: its activation sigmoid is none of gelu, relu and"):
        ft.accelerate(model, strict=True)
    with pytest.warns(UserWarning, match="nothing to accelerate: 0: its activation sigmoid"):
        ft.accelerate(model)
    assert type(model[0].norm1) is nn.LayerNorm  # no child of a layer that stays is swapped


def test_names_are_told_together():
    from fast_transformer.integrations.explanation import Explanation

    swapped = tuple((f"layer.{i}.norm", "LayerNorm") for i in (0, 1, 2, 5)) + (("", "X"),)
    report = str(Explanation("Net", swapped, (("layer.3.norm", "Own", "a subclass"),), ()))
    assert report.splitlines() == [
        "Net: 5 modules swapped, 1 stayed",
        "swapped",
        "  layer.0-2,5.norm  LayerNorm",
        "  the model         X",
        "stayed",
        "  layer.3.norm  Own: a subclass",
    ]


def test_self_check_keeps_what_disagrees(monkeypatch):
    from fast_transformer.integrations import bert, selfcheck

    monkeypatch.setattr(selfcheck, "_verdicts", {})
    right = bert._mlp
    monkeypatch.setattr(bert, "_mlp", lambda *args: right(*args) * 1.01)
    model = build()
    with pytest.raises(RuntimeError, match="encoder.layer.0: self-check: differs by"):
        ft.accelerate(model, strict=True)
    ft.accelerate(model)
    assert type(model.encoder.layer[0]).__module__.startswith("transformers.")
    assert "encoder.layer.0-1  BertLayer: self-check: differs by" in str(ft.explain(model))


def test_self_check_runs_once_for_layers_alike(monkeypatch):
    from fast_transformer.integrations import selfcheck

    monkeypatch.setattr(selfcheck, "_verdicts", {})
    checked = []
    compare = selfcheck._compare
    monkeypatch.setattr(
        selfcheck, "_compare", lambda m, *a: checked.append(type(m).__name__) or compare(m, *a)
    )
    ft.accelerate(build(num_hidden_layers=3))
    ft.accelerate(build(num_hidden_layers=3))
    assert checked.count("BertLayer") == 1
    ft.accelerate(build(hidden_act="relu"))
    assert checked.count("BertLayer") == 2
