"""ft.nn.LayerNorm, RMSNorm and MLP, the rule of what a fused step sees through, masks, packing."""

import copy
import functools
import pickle

import pytest
import torch
from module_parity import added, check, evaluate, padding, randomized, twins
from torch import nn
from torch.nn import functional as F

import fast_transformer as ft
from fast_transformer.backends import record
from fast_transformer.nn import plain
from fast_transformer.nn.masks import Masks, from_torch
from fast_transformer.nn.padding import Packing

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [  # input, normalized_shape
    ((1, 1), 1), ((5, 63), 63), ((2, 3, 65), (65,)), ((3, 4, 5), (4, 5)), ((7, 2, 3, 2), (2, 3, 2))
]  # fmt: skip
NORMS = [  # class and options
    ("LayerNorm", {}), ("LayerNorm", {"bias": False}),
    ("LayerNorm", {"elementwise_affine": False, "eps": 1e-2}),
    ("RMSNorm", {}), ("RMSNorm", {"elementwise_affine": False, "eps": 1e-2}),
]  # fmt: skip
OPS = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}


@pytest.mark.parametrize("norm, options", NORMS, ids=str)
@pytest.mark.parametrize("shape, over", SHAPES, ids=str)
def test_norm_in_float64(shape, over, norm, options):
    modules = twins(norm, over, **options)
    check(*modules, {"x": torch.randn(shape)}, ["x"], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm, options", NORMS, ids=str)
@pytest.mark.parametrize("shape, over", SHAPES[1:], ids=str)
def test_norm(backend, shape, over, norm, options, dtype):
    modules = twins(norm, over, **options)
    check(*modules, {"x": torch.randn(shape)}, ["x"], dtype)


@pytest.mark.parametrize("norm", OPS)
def test_norm_of_strided_input(backend, norm):
    stock, ours = twins(norm, (4, 5))
    x = torch.randn(5, 4, 3).permute(2, 1, 0)
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("norm", OPS)
def test_norm_runs_the_kernel(cpu, norm):
    _, ours = twins(norm, (4, 5))
    with record() as calls:
        ours(torch.randn(3, 4, 5))
    assert [(c.op, c.backend) for c in calls] == [(OPS[norm], "cpu")]


@pytest.mark.parametrize("norm", OPS)
def test_norm_state_and_class(norm):
    stock, ours = twins(norm, 6)
    x, kind, parent = torch.randn(3, 6), getattr(ft.nn, norm), getattr(nn, norm)
    assert isinstance(ours, parent) and repr(ours) == repr(stock)
    stock.load_state_dict(ours.state_dict(), strict=True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is kind and torch.equal(other(x), ours(x))
    expected = stock(x)
    stock.__class__ = kind
    with record() as calls:
        torch.testing.assert_close(stock(x), expected)
    assert len(calls) == 1
    stock.__class__ = parent
    assert torch.equal(stock(x), expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rms_norm_with_a_weight_of_another_dtype():
    """PyTorch takes any; ours hands over to it what the op does not take."""
    stock, ours = (m.to(torch.bfloat16) for m in twins("RMSNorm", 6))
    x = torch.randn(3, 6)
    assert torch.equal(ours(x), stock(x)) and ours(x).dtype == torch.float32


@pytest.mark.parametrize("norm", OPS)
def test_norm_errors(norm):
    kind = getattr(ft.nn, norm)
    with pytest.raises(ValueError, match=rf"{norm}: input has shape \(3, 7\).*\(6,\)"):
        kind(6)(torch.randn(3, 7))
    with pytest.raises(ValueError, match=rf"{norm}: input has shape \(5,\).*\(4, 5\)"):
        kind((4, 5))(torch.randn(5))


class Composed(nn.Module):
    """What an MLP should be, of torch's parts."""

    def __init__(self, channels, hidden, out, activation, bias):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, hidden, bias), nn.Linear(hidden, out, bias)
        self.activation = activation

    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x)))


ACTIVATIONS = {
    "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu, "silu": F.silu,
}  # fmt: skip


def mlps(activation="gelu", bias=True, out=9):
    ours = randomized(ft.nn.MLP(7, 33, out, activation=activation, bias=bias))
    stock = Composed(7, 33, 7 if out is None else out, ACTIVATIONS[activation], bias)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return stock, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_in_float64(activation, bias):
    check(*mlps(activation, bias), {"x": torch.randn(3, 5, 7)}, ["x"], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(backend, activation, bias, dtype):
    check(*mlps(activation, bias, None), {"x": torch.randn(3, 5, 7)}, ["x"], dtype)


def test_mlp_runs_one_kernel_and_copies(cpu):
    _, ours = mlps()
    x = torch.randn(2, 7)
    with record() as calls:
        expected = ours(x)
    assert [(c.op, c.backend) for c in calls] == [("mlp", "cpu")] and expected.shape == (2, 9)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected)


def test_mlp_dropout(backend):
    ours = ft.nn.MLP(7, 400, dropout=0.5)
    x, found = torch.randn(3, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(ours(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    # the mean over many masks is what no mask gives
    torch.manual_seed(3)
    mean = torch.stack([ours(x) for _ in range(600)]).mean(0)
    torch.testing.assert_close(mean, ours.eval()(x), atol=0.03, rtol=0)
    assert not torch.allclose(found[0], ours(x), atol=0.03)


def test_mlp_is_initialised_as_linear_is():
    torch.manual_seed(4)
    ours = ft.nn.MLP(7, 33, dtype=torch.float64)
    torch.manual_seed(4)
    first, second = nn.Linear(7, 33, dtype=torch.float64), nn.Linear(33, 7, dtype=torch.float64)
    assert torch.equal(ours.linear1.weight, first.weight)
    assert torch.equal(ours.linear2.bias, second.bias)
    assert ft.nn.MLP(7, 33, device="meta").linear1.weight.is_meta


def test_mlp_errors():
    with pytest.raises(ValueError, match="activation is 'swish'; accepted are gelu, gelu_tanh"):
        ft.nn.MLP(4, 8, activation="swish")
    with pytest.raises(ValueError, match=r"\b5\b"):
        ft.nn.MLP(4, 8)(torch.randn(2, 5))


def nothing(*args):
    """A hook that changes nothing."""


HOOKS = {
    "forward": lambda m: m.register_forward_hook(nothing),
    "pre": lambda m: m.register_forward_pre_hook(nothing),
    "backward": lambda m: m.register_full_backward_hook(nothing),
    "backward pre": lambda m: m.register_full_backward_pre_hook(nothing),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooked_modules_are_not_plain(hook):
    module = nn.Linear(3, 3)
    assert plain.is_linear(module) and not plain.any_hooked(nn.Sequential(module))
    handle = HOOKS[hook](module)
    assert plain.hooked(module) and not plain.is_linear(module)
    assert plain.any_hooked(nn.Sequential(nn.Sequential(module)))
    handle.remove()
    assert plain.is_linear(module)


def test_a_forward_of_its_own_is_not_plain(cpu):
    module = nn.Linear(3, 4)
    module.forward = lambda x: x + 1
    assert not plain.is_linear(module)
    x = torch.randn(2, 3)
    assert torch.equal(plain.linear(module, x), x + 1)


def test_subclasses_and_parametrized_modules_are_not_plain(cpu):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, module = torch.randn(2, 3), Doubled(3, 4)
    assert not plain.is_linear(module) and torch.equal(plain.linear(module, x), module(x))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert not plain.is_linear(normed)
    torch.testing.assert_close(plain.linear(normed, x), normed(x))
    assert not plain.is_norm(nn.RMSNorm(4)) and not plain.is_norm(nn.LayerNorm((3, 4)))
    assert not plain.is_norm(None)


def test_activation_names():
    class Mine(nn.GELU):
        pass

    named = {
        "gelu": (F.gelu, nn.GELU()), "gelu_tanh": (nn.GELU("tanh"),), "silu": (F.silu, nn.SiLU()),
        "relu": (F.relu, nn.ReLU(), nn.ReLU(inplace=True)),
        None: (torch.tanh, nn.ReLU6(), nn.Tanh(), Mine(), lambda x: x),
    }  # fmt: skip
    for name, activations in named.items():
        assert [plain.activation_name(a) for a in activations] == [name] * len(activations)


@pytest.mark.parametrize("dropout_hook, norm_hook", [(True, False), (False, True), (False, False)])
def test_residual_norm_in_parts(cpu, dropout_hook, norm_hook):
    """Whatever is watched is called once, and the result is what the parts give."""
    x, residual, heard = torch.randn(4, 6), torch.randn(4, 6), []
    dropout, norm = nn.Dropout(0.0), randomized(nn.LayerNorm(6))
    for module, watched in ((dropout, dropout_hook), (norm, norm_hook)):
        if watched:
            module.register_forward_hook(lambda *args: heard.append(args))
    expected = F.layer_norm(x + residual, (6,), norm.weight, norm.bias)
    with record() as calls:
        found = plain.residual_norm(dropout, norm, x, residual)
        out, total = plain.residual_norm_and_sum(dropout, norm, x, residual)
    torch.testing.assert_close((found, out, total), (expected, expected, x + residual))
    assert len(heard) == 2 * (dropout_hook + norm_hook)
    assert [c.op for c in calls] == ([] if norm_hook else ["add_norm", "add_norm"])


def formula(q, k, v, masks, T, S):
    scores = q @ k.mT * q.shape[-1] ** -0.5 + masks.added(T, S, q)
    return scores.softmax(-1) @ v


FORMS = {"none": None, "bool": lambda m: m, "float": added}


@pytest.mark.parametrize("padded", ["none", "right", "left", "holes", "right-float", "holes-float"])
@pytest.mark.parametrize("attended", ["none", "bool", "float", "causal"])
def test_masks_as_options_and_as_numbers_agree(padded, attended):
    """ft.attention with the options against a softmax over scores with the numbers added."""
    B, H, T, S = 2, 3, 6, 8
    random = torch.Generator().manual_seed(6)
    forbidden = torch.rand(T, S, generator=random) < 0.3
    forbidden[:, 0] = forbidden[:, -1] = False
    kind, _, form = padded.partition("-")
    drop = None if kind == "none" else FORMS[form or "bool"](padding(kind, B, S))
    causal = attended == "causal"
    if causal:
        forbidden = torch.ones(T, S, dtype=torch.bool).triu(1)
    mask = None if attended == "none" else (added if attended == "float" else bool_)(forbidden)
    masks = from_torch("here", mask, drop, causal, (B, H, T, S))
    q, k, v = (torch.randn(B, H, n, 4, dtype=torch.float64) for n in (T, S, S))
    options = masks.options(q.dtype)
    empty = (masks.added(T, S, q) == -torch.inf).all(-1, keepdim=True)
    expected = formula(q, k, v, masks, T, S).masked_fill(empty, 0)
    torch.testing.assert_close(ft.attention(q, k, v, **options), expected)
    at_an_end = kind in ("right", "left") and not form
    assert ("key_lengths" in options or "key_starts" in options) == at_an_end
    # and against the masks themselves
    whole = torch.zeros(B, 1, T, S, dtype=torch.bool)
    whole = whole if mask is None else whole | forbidden
    whole = whole if drop is None else whole | padding(kind, B, S)[:, None, None, :]
    assert torch.equal((masks.added(T, S, q) == -torch.inf).expand(B, 1, T, S), whole)


def bool_(mask):
    return mask


def test_masks_extended():
    masks = Masks(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(4, 3), False)
    longer = masks.extended(2)
    assert masks.extended(0) is masks
    assert longer.attention.tolist() == [[False, False, False, True, True]] * 2
    assert longer.padding.shape == (4, 5) and not longer.padding.any()


def test_packing():
    keep = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    packing = Packing(keep)
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5] and packing.max_seqlen == 3
    assert packing.cu_seqlens.dtype == torch.int32
    x = torch.arange(9.0).view(3, 3, 1)
    assert packing.pack(x).flatten().tolist() == [0, 2, 6, 7, 8]
    back = packing.unpack(packing.pack(x + 1) - 1)
    assert torch.equal(back, (x).masked_fill(~keep[..., None], 0))
    same = Packing.of_lengths([2, 0, 3], x.device)
    assert torch.equal(same.cu_seqlens, packing.cu_seqlens) and same.max_seqlen == 3


def test_packing_passes_gradients_to_tokens_alone():
    keep = ~padding("holes", 3, 5)
    packing, x = Packing(keep), torch.randn(3, 5, 2, requires_grad=True)
    weights = torch.randn(3, 5, 2)
    (packing.unpack(packing.pack(x) * 2) * weights).sum().backward()
    assert torch.equal(x.grad, (2 * weights).masked_fill(~keep[..., None], 0))


def test_the_check_itself_fails():
    """A parameter that is off by one part in a thousand does not pass."""
    stock, ours = twins("LayerNorm", 6)
    ours.weight.data[2] *= 1.001
    with pytest.raises(AssertionError, match="0"):
        check(stock, ours, {"x": torch.randn(5, 6)}, ["x"], torch.float32)
    results = evaluate(ours, {"x": torch.randn(5, 6)}, ["x"], {}, torch.float32)
    assert list(results) == ["0", "dx", "dweight", "dbias"]
