"""RotaryEmbedding: its table, its growth, and what becomes of it in copies and programs."""

import copy
import pickle

import pytest
import torch

import fast_transformer as ft


def inputs(T=6, D=16, dtype=torch.float32, B=2):
    return torch.randn(B, 4, T, D).to(dtype), torch.randn(B, 2, T, D).to(dtype)


def by_hand(positions, dim, base=10000.0):
    angles = positions.double()[..., None] / base ** (torch.arange(0, dim, 2).double() / dim)
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [16, 6])
def test_is_the_function(backend, dim, interleaved):
    query, key = inputs()
    module = ft.nn.RotaryEmbedding(dim, interleaved=interleaved)
    expected = ft.rotary(query, key, *by_hand(torch.arange(6), dim), interleaved=interleaved)
    for found, x in zip(module(query, key), expected, strict=True):
        assert torch.equal(found, x)
    assert torch.equal(module(query), expected[0])
    packed = query[0].transpose(0, 1)
    assert torch.equal(module(packed), expected[0][0].transpose(0, 1))


def test_is_llamas():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default",
        "rope_theta": 500.0},
    )  # fmt: skip
    query, key = inputs(T=300)
    position_ids = torch.arange(300)[None]
    cos, sin = modeling.LlamaRotaryEmbedding(config)(query, position_ids)
    expected = modeling.apply_rotary_pos_emb(query, key, cos, sin)
    found = ft.nn.RotaryEmbedding(16, base=500.0)(query, key)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)  # their angles are float32


def test_is_gptjs():
    modeling = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    query, key = inputs(T=40)
    table = modeling.create_sinusoidal_positions(40, 12)
    sin, cos = table[None].chunk(2, -1)
    found = ft.nn.RotaryEmbedding(12, interleaved=True)(query, key)
    for x, y in zip((query, key), found, strict=True):
        turned = modeling.apply_rotary_pos_emb(x[..., :12].transpose(1, 2), sin, cos)
        expected = torch.cat((turned.transpose(1, 2), x[..., 12:]), -1)
        torch.testing.assert_close(y, expected, atol=2e-5, rtol=0)


def test_the_table_grows(backend):
    module = ft.nn.RotaryEmbedding(16, positions=0)
    query, key = inputs(T=5)
    module(query, key)
    assert module.cos.shape == (8, 8)
    module(query, key, offset=30)
    assert module.cos.shape == (64, 8)
    module(query, position_ids=torch.tensor([0, 1, 200, 3, 4]))
    assert module.cos.shape == (256, 8)
    assert torch.equal(module.cos, by_hand(torch.arange(256), 16)[0])


def test_offset_and_position_ids(backend):
    query, key = inputs(T=10)
    module = ft.nn.RotaryEmbedding(16)
    whole = module(query, key)
    for found, x in zip(module(query[:, :, 7:], key[:, :, 7:], offset=7), whole, strict=True):
        assert torch.equal(found, x[:, :, 7:])
    ids = torch.stack((torch.arange(10), torch.arange(10).flip(0)))
    turned, _ = module(query, key, position_ids=ids)
    assert torch.equal(turned[0], whole[0][0])
    assert torch.equal(turned[1], module(query.flip(2), key)[0][1].flip(1))
    assert torch.equal(module(query, position_ids=ids[1].int())[1], turned[1])


def test_far_positions_are_exact():
    module = ft.nn.RotaryEmbedding(16)
    query, _ = inputs(T=1, dtype=torch.float64)
    far = torch.tensor([1_000_003])
    exact = ft.nn.RotaryEmbedding(16, dtype=torch.float64)
    expected = exact(query, position_ids=far)
    torch.testing.assert_close(module(query.float(), position_ids=far).double(), expected,
                               atol=1e-6, rtol=1e-6)  # fmt: skip


def test_a_cast_leaves_the_table(backend):
    module = ft.nn.RotaryEmbedding(16)
    cos = module.cos
    module.to(torch.bfloat16)
    assert module.cos.dtype == torch.float32 and torch.equal(module.cos, cos)
    query, key = inputs(dtype=torch.bfloat16)
    assert module(query, key)[0].dtype == torch.bfloat16
    low = ft.nn.RotaryEmbedding(16, dtype=torch.bfloat16)
    assert low.cos.dtype == torch.bfloat16 and low(query).dtype == torch.bfloat16


def test_from_the_meta_device(backend):
    module = ft.nn.RotaryEmbedding(16, device="meta")
    assert module.cos.is_meta
    module.to_empty(device="cpu")
    assert torch.equal(module.cos, ft.nn.RotaryEmbedding(16).cos)


@pytest.mark.parametrize("journey", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(backend, journey):
    module = ft.nn.RotaryEmbedding(16, base=100.0, interleaved=True, positions=10)
    assert not module.state_dict()
    query, key = inputs(T=20)
    expected = module(query, key)
    for found, x in zip(journey(module)(query, key), expected, strict=True):
        assert torch.equal(found, x)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("positions", [0, 64])
def test_compiles_whole(backend, positions, ids):
    module = ft.nn.RotaryEmbedding(16, positions=positions)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 7, 9):
        query, key = inputs(T=T)
        given = {"position_ids": torch.arange(T).flip(0)} if ids else {}
        expected = ft.nn.RotaryEmbedding(16)(query, key, **given)
        torch.testing.assert_close(compiled(query, key, **given), expected)
    assert module.cos.shape[0] == positions


WRONG = [
    ({"dim": 7}, {}, ValueError, "RotaryEmbedding: dim is 7; it must be even."),
    ({"dim": 4.0}, {}, TypeError, "RotaryEmbedding: dim must be an int, got float."),
    (
        {"dim": 8, "positions": -1},
        {},
        ValueError,
        "RotaryEmbedding: positions is -1; it must not be negative.",
    ),
    (
        {"dim": 8, "base": 0.0},
        {},
        ValueError,
        "RotaryEmbedding: base is 0.0; it must be positive.",
    ),
    (
        {"dim": 8},
        {"offset": -1},
        ValueError,
        "RotaryEmbedding: offset is -1; it must not be negative.",
    ),
    (
        {"dim": 8},
        {"position_ids": torch.tensor([0, -2, 1, 1, 1, 1])},
        ValueError,
        "RotaryEmbedding: position_ids holds -2; it must not be negative.",
    ),
    (
        {"dim": 8},
        {"position_ids": torch.ones(6)},
        TypeError,
        "RotaryEmbedding: position_ids must be an int32 or int64 tensor, got torch.float32.",
    ),
    (
        {"dim": 8},
        {"position_ids": torch.arange(6), "offset": 2},
        ValueError,
        "RotaryEmbedding: offset is 2 beside position_ids; give one of them.",
    ),
    (
        {"dim": 18},
        {},
        ValueError,
        "rotary: cos has 9 columns, one for each pair; query's head_dim 16 has 8 pairs. Where cos "
        "repeats itself, pass its first half.",
    ),
]


@pytest.mark.parametrize(("made", "given", "error", "message"), WRONG)
def test_errors(made, given, error, message):
    with pytest.raises(error) as raised:
        ft.nn.RotaryEmbedding(**made)(inputs()[0], **given)
    assert str(raised.value) == message
