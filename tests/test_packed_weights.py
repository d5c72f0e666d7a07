"""Packed weights: the ops against linear_act's definition, and what modules make of them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fast_transformer as ft
from fast_transformer import testing
from fast_transformer.backends import record
from fast_transformer.nn.packed_weights import PackedParameter, packed_parameters
from fast_transformer.nn.plain import linear, perceptron
from fast_transformer.ops import packed as ops
from fast_transformer.reference import linear_act, mlp

SHAPES = [
    (1, 1, 1), (3, 5, 7), (2, 63, 65), (4, 40, 50), (17, 127, 130), (65, 800, 96), (197, 70, 333),
]  # fmt: skip


def layer(N, K, dtype):
    return (torch.randn(N, K) * K**-0.5).to(dtype), torch.randn(N).to(dtype)


def dequantised(packed):
    return packed.data.double() * packed.scale.double()[:, None]


def judged(got, same, exact):
    testing.assert_close_to_reference({"0": got}, {"0": same}, {"0": exact})


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear(kernels, shape, activation, dtype):
    M, K, N = shape
    x = torch.randn(M, K).to(dtype)
    weight, bias = layer(N, K, dtype)
    packed = ops.pack(weight)
    got = ops.packed_linear(x, packed, bias, activation=activation)
    same = linear_act(x, weight, bias, activation=activation)
    exact = linear_act(x.double(), weight.double(), bias.double(), activation=activation)
    judged(got, same, exact)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_what_it_stands_for(kernels, shape, dtype):
    M, K, N = shape
    x = torch.randn(M, K).to(dtype)
    weight, bias = layer(N, K, dtype)
    packed = ops.pack(weight, int8=True)
    rounded = dequantised(packed)
    assert packed.data.dtype == torch.int8 and packed.data.abs().max() == 127
    row = weight.double().abs().amax(1)
    assert ((rounded - weight.double()).abs().amax(1) <= row / 254 * (1 + 1e-4)).all()
    error = ((rounded - weight).abs().amax(1) / row).max().item()
    assert packed.error == pytest.approx(error, abs=1e-6)
    exact = linear_act(x.double(), rounded, bias.double())
    same = linear_act(x, rounded.to(dtype), bias)
    judged(ops.packed_linear(x, packed, bias), same, exact)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["panels", "int8"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("M", [1, 7, 130, 2900])
def test_mlp(kernels, M, biased, int8, dtype):
    C, F, N = 40, 1600, 23
    x = torch.randn(M, C).to(dtype)
    (w1, b1), (w2, b2) = layer(F, C, dtype), layer(N, F, dtype)
    if not biased:
        b1 = b2 = None
    packed = ops.pack(w1, int8), ops.pack(w2, int8)
    if int8:
        w1, w2 = (dequantised(p) for p in packed)
    wide = [None if t is None else t.double() for t in (x, w1, b1, w2, b2)]
    same = mlp(x, w1.to(dtype), b1, w2.to(dtype), b2, activation="gelu_tanh")
    got = ops.packed_mlp(x, packed[0], b1, packed[1], b2, activation="gelu_tanh")
    judged(got, same, mlp(*wide, activation="gelu_tanh"))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts_and_empty_sizes(kernels, dtype):
    wide = torch.randn(30, 2 * 33).to(dtype)
    weight, bias = wide[:, 5:38], torch.randn(60).to(dtype)[::2]
    x = torch.randn(4, 6, 40).to(dtype)[..., 3:36]
    packed = ops.pack(weight)
    expected = ops.packed_linear(x.contiguous(), ops.pack(weight.contiguous()), bias.contiguous())
    assert torch.equal(ops.packed_linear(x, packed, bias), expected)
    assert ops.packed_linear(x[:0], packed, bias).shape == (0, 6, 30)


@pytest.mark.parametrize("int8", [False, True], ids=["panels", "int8"])
def test_rows_of_zeros_and_bits_of_threads(kernels, threads, int8):
    weight, bias = layer(300, 700, torch.float32)
    weight[3] = 0
    x, found = torch.randn(90, 700), []
    for count in (1, 2, 3):
        threads(count)
        found.append(ops.packed_linear(x, ops.pack(weight, int8), bias))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][:, 3], bias[3].expand(90))


def test_a_wrong_pack_is_refused(kernels):
    packed = ops.pack(torch.randn(8, 16))
    with pytest.raises(RuntimeError, match="another size, dtype or instruction set"):
        ops.packed_linear(torch.randn(2, 80), packed, None)
    with pytest.raises(RuntimeError, match="of the input's dtype"):
        ops.packed_linear(torch.randn(2, 16), packed, torch.randn(8).bfloat16())


# ---- modules


def encoder(dtype=torch.float32):
    torch.manual_seed(3)
    one = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.1, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=False).to(dtype).eval()


def prepared(inference=True, dtype=torch.float32):
    return ft.accelerate(encoder(dtype), inference=inference)


def ops_of(model, x):
    with record() as calls, torch.no_grad():
        model(x)
    return {call.op for call in calls}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_prepared_encoder_gives_the_same(kernels, dtype):
    x = torch.randn(3, 9, 32).to(dtype)
    plain, fast = ft.accelerate(encoder(dtype)), prepared(dtype=dtype)
    with torch.no_grad():
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(fast(x), plain(x), atol=tolerance, rtol=tolerance)
    assert "packed_mlp" in ops_of(fast, x) and "packed_mlp" not in ops_of(plain, x)


def test_int8_is_near_and_told(kernels):
    x = torch.randn(3, 9, 32)
    fast = prepared("int8")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), encoder()(x), atol=0.05, rtol=0.05)
        assert not torch.allclose(fast(x), encoder()(x), atol=1e-5)
    told = ft.explain(fast)
    assert 0 < told.packed_error <= 1 / 254 + 1e-4 and "int8 errs by up to 0.3" in str(told)


def test_explain_counts_the_bytes(kernels):
    fast = prepared()
    held = [kept.held.nbytes for _, _, kept in packed_parameters(fast)]
    assert len(held) >= 4 and ft.explain(fast).packed_bytes == sum(held) > 0
    assert "packed weights" in str(ft.explain(fast))
    assert "packed weights" not in str(ft.explain(ft.accelerate(encoder())))


def first_linear(model):
    return model.layers[0].linear1


EDITS = {
    "in place": lambda m: m.weight.mul_(2),
    "loaded": lambda m: m.load_state_dict({"weight": m.weight * 2, "bias": m.bias}),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2)),
    "optimizer": lambda m: (
        setattr(m.weight, "grad", -m.weight.detach()),
        torch.optim.SGD([m.weight], lr=1.0).step(),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_noticed(kernels, edit):
    x, fast, plain = torch.randn(2, 5, 32), prepared(), ft.accelerate(encoder())
    with torch.no_grad():
        before = fast(x)
        for model in (fast, plain):
            EDITS[edit](first_linear(model))
        after = fast(x)
        assert not torch.allclose(after, before, atol=1e-4)
        torch.testing.assert_close(after, plain(x))


def test_a_parameter_at_the_address_of_another_is_noticed(kernels):
    """Memory is given back and out again between two calls, without a change of versions."""
    x, fast, reused = torch.randn(2, 5, 32), prepared(), 0
    linear = first_linear(fast)
    for _ in range(20):
        with torch.no_grad():
            fast(x)
        before = linear.weight.data_ptr(), linear.weight._version
        linear.weight = None
        linear.weight = nn.Parameter(torch.randn(48, 32))
        reused += before == (linear.weight.data_ptr(), linear.weight._version)
        with torch.no_grad():
            got = fast(x)
            with ft.backend("reference"):
                torch.testing.assert_close(got, fast(x))
    assert reused


def test_weights_that_were_rounded_on_the_way_are_noticed(kernels):
    x, fast = torch.randn(2, 5, 32), prepared()
    with torch.no_grad():
        for _ in range(10):
            for parameter in fast.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
            fast(x)
            fast.bfloat16().float()
            got = fast(x)
            with ft.backend("reference"):
                torch.testing.assert_close(got, fast(x))


def test_an_edit_through_data_needs_repack(kernels):
    x, fast, plain = torch.randn(2, 5, 32), prepared(), ft.accelerate(encoder())
    for model in (fast, plain):
        first_linear(model).weight.data.mul_(2)
    with torch.no_grad():
        assert not torch.allclose(fast(x), plain(x), atol=1e-4)
        assert ft.repack(fast) is fast
        torch.testing.assert_close(fast(x), plain(x))


def test_where_the_parameter_itself_is_used(kernels):
    x, fast = torch.randn(2, 5, 32), prepared()

    def packed(run):
        with record() as calls:
            run()
        return any(call.op.startswith("packed") for call in calls)

    def no_grad():
        with torch.no_grad():
            fast(x)

    def autocast():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            fast(x)

    def on_reference():
        with torch.no_grad(), ft.backend("reference"):
            fast(x)

    assert packed(no_grad)
    assert not packed(lambda: fast(x))  # the parameters want a gradient
    assert not packed(autocast) and not packed(on_reference)
    weights = {name: p.detach().expand(2, *p.shape) for name, p in fast.named_parameters()}
    transforms = {
        "jvp": lambda: torch.func.jvp(fast, (x,), (x,)),
        "vmap": lambda: torch.func.vmap(fast)(x[:, None]),
        "of weights": lambda: torch.func.vmap(
            lambda w: torch.func.functional_call(fast, w, (x,))
        )(weights),
    }  # fmt: skip
    for transform in transforms.values():
        with torch.no_grad():
            assert not packed(transform)
    fast.train()
    assert not packed(no_grad)
    fast.eval()
    fast(x).sum().backward()
    assert first_linear(fast).weight.grad is not None


def test_too_many_features_are_told_as_without_packing(kernels):
    fast = prepared()
    with torch.no_grad(), pytest.raises(ValueError, match="linear_act: weight has shape"):
        linear(first_linear(fast), torch.randn(2, 31))
    with torch.no_grad(), pytest.raises(ValueError, match="mlp: w1 has shape"):
        perceptron(first_linear(fast), fast.layers[0].linear2, "gelu", torch.randn(2, 31))


def test_copies_and_files(kernels):
    x, fast = torch.randn(2, 5, 32), prepared()
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    assert fast.state_dict().keys() == encoder().state_dict().keys()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert all(kept.held is None for _, _, kept in packed_parameters(other))
        with torch.no_grad():
            torch.testing.assert_close(other(x), fast(x), atol=0, rtol=0)
        assert any(kept.held for _, _, kept in packed_parameters(other))


def test_restore_and_accelerate_again_drop_them(kernels):
    fast = prepared()
    assert list(packed_parameters(fast))
    assert not list(packed_parameters(ft.accelerate(fast)))
    assert not list(packed_parameters(ft.restore(ft.accelerate(fast, inference=True))))


def test_what_nobody_would_read_is_not_packed(kernels):
    unread = ft.nn.GatedMLP(16, 24), ft.nn.LinearCrossEntropy(16, 30)
    model = ft.accelerate(nn.Sequential(encoder(), *unread), inference=True)
    held = [name for name, _, _ in packed_parameters(model)]
    assert held and all(name.startswith("0.") for name in held)


def test_inference_tensors_use_the_parameter(kernels):
    with torch.inference_mode():
        fast = prepared()
        kept = PackedParameter("weight", False)
        assert kept.renew(first_linear(fast)) is None
        assert fast(torch.randn(2, 5, 32)).isfinite().all()


def test_an_unknown_wish_is_refused():
    model = encoder()
    with pytest.raises(ValueError, match="'int4'; accepted are False, True and 'int8'"):
        ft.accelerate(model, inference="int4")
    assert not any("_stock_class" in m.__dict__ for m in model.modules())
    with pytest.raises(TypeError, match="repack: model must be"):
        ft.repack(3)


def test_the_compiler_uses_the_parameter(kernels):
    x, fast = torch.randn(2, 5, 32), prepared()
    with torch.no_grad():
        expected = fast(x)
        torch.testing.assert_close(torch.compile(fast)(x), expected)
