"""Attention: the definition against PyTorch's, the kernels against the definition."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import surrounded
from torch.nn.functional import scaled_dot_product_attention

import fast_transformer as ft
from fast_transformer import testing

NAN = float("nan")


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def qkv(B=2, H=2, T=9, S=13, D=16, dtype=torch.float32, scale=1.0):
    return tuple(draw(B, H, n, D, dtype=dtype, scale=scale) for n in (T, S, S))


@pytest.mark.parametrize("mask", ["full", "causal", "bool", "additive"])
def test_reference_is_pytorchs(mask):
    T, S = 7, 7 if mask == "causal" else 11
    q, k, v = (x.requires_grad_() for x in qkv(T=T, S=S, dtype=torch.float64))
    theirs = {"is_causal": mask == "causal"}
    ours = {"causal": mask == "causal"}
    if mask == "bool":
        theirs["attn_mask"] = ours["bias"] = (torch.rand(T, S) < 0.7) | (torch.arange(S) == 0)
    elif mask == "additive":
        theirs["attn_mask"] = ours["bias"] = draw(2, 1, T, S, dtype=torch.float64)
    with ft.backend("reference"):
        out = ft.attention(q, k, v, **ours)
    expected = scaled_dot_product_attention(q, k, v, **theirs)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), weights),
        torch.autograd.grad(expected, (q, k, v), weights),
    )


def test_reference_logsumexp():
    q, k, v = qkv(dtype=torch.float64)
    with ft.backend("reference"):
        _, lse = ft.attention(q, k, v, scale=0.3, return_lse=True)
    torch.testing.assert_close(lse, (q @ k.mT * 0.3).logsumexp(-1))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.3}, {"bias": True}])
def test_reference_varlen_is_each_sequence_alone(options):
    q_lengths, k_lengths = [3, 0, 5, 1], [4, 2, 0, 7]
    cu_q, cu_k = testing.offsets(q_lengths), testing.offsets(k_lengths)
    q = draw(sum(q_lengths), 2, 8, dtype=torch.float64)
    k, v = (draw(sum(k_lengths), 2, 8, dtype=torch.float64) for _ in range(2))
    bias = draw(4, 2, 5, 7, dtype=torch.float64) if options.pop("bias", False) else None
    if "dropout_p" in options:
        options["seed"] = torch.tensor(3)
    with ft.backend("reference"):
        out, lse = ft.attention_varlen(
            q, k, v, cu_q, cu_k, 5, 7, bias=bias, return_lse=True, **options
        )
        for b, (T, S) in enumerate(zip(q_lengths, k_lengths, strict=True)):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            alone = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
            if "dropout_p" in options:  # the mask belongs to sequence b: put b others before it
                alone = [x.expand(b + 1, -1, -1, -1) for x in alone]
            part = None if bias is None else bias[b, :, :T, :S]
            expected, expected_lse = ft.attention(*alone, bias=part, return_lse=True, **options)
            torch.testing.assert_close(out[rows], expected[-1].transpose(0, 1))
            torch.testing.assert_close(lse[:, rows], expected_lse[-1])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.4}, {"bias": True}])
def test_reference_gradcheck(options):
    q, k, v = (x.requires_grad_() for x in qkv(B=2, H=1, T=3, S=4, D=2, dtype=torch.float64))
    inputs = [q, k, v]
    if options.pop("bias", False):
        inputs.append(draw(1, 3, 4, dtype=torch.float64).requires_grad_())

    def call(q, k, v, bias=None):
        return ft.attention(
            q, k, v, bias=bias, key_lengths=torch.tensor([4, 2]), key_starts=torch.tensor([1, 0]),
            seed=torch.tensor(1), return_lse=not options.get("causal"), **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs)
    if not options:
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("attention", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype), case.wrt)


def test_only_what_needs_a_gradient_gets_one(backend):
    for needed in itertools.product([False, True], repeat=3):
        inputs = [x.requires_grad_(n) for x, n in zip(qkv(), needed, strict=True)]
        out = ft.attention(*inputs)
        assert out.requires_grad == any(needed)
        if any(needed):
            out.sum().backward()
        assert tuple(x.grad is not None for x in inputs) == needed


def test_gradient_through_the_logsumexp_alone(cpu):
    def gradient(q, k, v):
        q.requires_grad_()
        return torch.autograd.grad(ft.attention(q, k, v, return_lse=True)[1].sum(), q)[0]

    inputs = qkv()
    with ft.backend("reference"):
        expected = gradient(*(x.double() for x in inputs))
    torch.testing.assert_close(gradient(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.02, -1.0, 3.0])
def test_scale(cpu, scale):
    q, k, v = qkv()
    inputs = {"query": q, "key": k, "value": v, "scale": scale, "return_lse": True}
    testing.check("attention", inputs, ("query", "key", "value"))


@pytest.mark.parametrize("offset", [-20, -3, 0, 2, 30])
@pytest.mark.parametrize("sizes", [(9, 13), (70, 65)], ids=str)
def test_causal_offset(cpu, offset, sizes):
    q, k, v = qkv(T=sizes[0], S=sizes[1])
    inputs = {"query": q, "key": k, "value": v, "causal": True, "causal_offset": offset}
    testing.check("attention", inputs | {"return_lse": True}, ("query", "key", "value"))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 30.0, 1e4, 1e15])
def test_magnitudes(cpu, scale, dtype):
    """Scores from 0 to far beyond what exp can take, where the products themselves are finite."""
    if dtype == torch.float16 and scale > 1e4:
        scale = 1e3
    if dtype == torch.float16 and scale < 1e-4:
        scale = 1e-6
    q, k, v = qkv(T=20, S=70, D=24, dtype=dtype, scale=scale)
    v = draw(*v.shape, dtype=dtype)
    inputs = {"query": q, "key": k, "value": v, "return_lse": True}
    with ft.backend("reference"):
        exact = testing.evaluate("attention", testing.in_float64(inputs), ())
    got = testing.evaluate("attention", inputs, ("query", "key", "value"))
    assert all(bool(x.isfinite().all()) for x in got.values())
    if dtype == torch.float32 or scale <= 30:
        testing.check("attention", inputs, ())
    else:  # one key takes all: which one is what rounding decides, so look at the exact softmax
        assert (got["1"].double() / exact["1"] - 1).abs().max() < 0.01


@pytest.mark.parametrize("bias", [-1e30, -torch.inf, 1e30])
def test_extreme_bias(cpu, bias):
    q, k, v = qkv(T=20, S=70)
    mask = torch.zeros(20, 70).masked_fill(torch.rand(20, 70) < 0.5, bias)
    mask[3] = bias  # the whole row
    inputs = {"query": q, "key": k, "value": v, "bias": mask, "return_lse": True}
    testing.check("attention", inputs, ("query", "key", "value"))


LAYOUTS = {
    "batch-length-heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "length-first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "every-second-row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "strided-head-dim": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "head-dim-first": lambda x: x.mT.contiguous().mT,
    "offset": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "one-head-for-all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_strides(cpu, layout, dtype):
    q, k, v = (LAYOUTS[layout](x) for x in qkv(T=70, S=65, dtype=dtype))
    inputs = {"query": q, "key": k, "value": v, "causal": True, "return_lse": True}
    testing.check("attention", inputs, ("query", "key", "value"))


@pytest.mark.parametrize(
    "shape", [(), (1,), (13,), (9, 1), (9, 13), (2, 1, 13), (2, 1, 1, 1), (1, 2, 9, 13)]
)
@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16", "transposed"])
def test_bias_broadcasts(cpu, shape, kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    q, k, v = qkv(dtype=dtype)
    bias = torch.rand(shape) < 0.8 if kind == "bool" else draw(*shape, dtype=dtype)
    if kind == "transposed" and len(shape) > 1:
        bias = bias.mT.contiguous().mT
    inputs = {"query": q, "key": k, "value": v, "bias": bias, "return_lse": True}
    testing.check("attention", inputs, ("query", "key", "value"))


def test_float32_bias_on_lower_dtype(cpu):
    q, k, v = qkv(dtype=torch.bfloat16)
    inputs = {"query": q, "key": k, "value": v, "bias": draw(9, 13), "return_lse": True}
    testing.check("attention", inputs, ("query", "key", "value"))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty(backend, shape, causal):
    B, H, T, S = shape
    q, k, v = (x.requires_grad_() for x in qkv(B, H, T, S))
    out, lse = ft.attention(q, k, v, causal=causal, dropout_p=0.1, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (B, H, T)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [3, 0, 2]])
def test_empty_sequences(backend, lengths):
    cu = testing.offsets(lengths)
    x = draw(sum(lengths), 2, 8).requires_grad_()
    out = ft.attention_varlen(x, x, x, cu, cu, 3, 3)
    out.sum().backward()
    assert out.shape == x.shape and bool(out.isfinite().all()) and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("by", ["lengths", "starts", "bool", "causal", "infinite"])
def test_rows_without_a_key(backend, by, dtype):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    q, k, v = (x.requires_grad_() for x in qkv(T=70, S=70, dtype=dtype))
    options = {
        "lengths": {"key_lengths": torch.tensor([0, 70])},
        "starts": {"key_starts": torch.tensor([70, 0], dtype=torch.int32)},
        "bool": {"bias": torch.tensor([False, True]).view(2, 1, 1, 1)},
        "causal": {"causal": True, "causal_offset": -68},
        "infinite": {"bias": torch.tensor([-torch.inf, 0.0]).view(2, 1, 1, 1).to(dtype)},
    }[by]
    out, lse = ft.attention(q, k, v, return_lse=True, **options)
    # both outputs are differentiated, also where the logsumexp is infinite
    grads = torch.autograd.grad((out, lse), (q, k, v), (draw_like(out), draw_like(lse)))
    empty = (slice(None), slice(None), slice(68)) if by == "causal" else (0,)
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    assert (grads[0][empty] == 0).all()
    if by != "causal":
        assert (grads[1][0] == 0).all() and (grads[2][0] == 0).all()
    for x in (out, *grads):
        assert bool(x.isfinite().all())


def draw_like(x):
    return torch.randn(x.shape).to(x.dtype)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_rows_without_a_key_pass_nothing_on(cpu, dtype):
    """Whatever gradient reaches such a row, as that of a merge of two -inf, which is NaN."""
    q, k, v = (torch.randn(1, 2, 7, 40).to(dtype).requires_grad_() for _ in range(3))
    allowed = torch.ones(7, 7, dtype=torch.bool)
    allowed[2] = allowed[5] = False
    grads = []
    for poison in (0.0, float("nan"), float("inf")):
        out, lse = ft.attention(q, k, v, bias=allowed, return_lse=True)
        torch.manual_seed(0)
        grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
        for rows in (grad_out, grad_lse):
            rows[:, :, [2, 5]] = poison
        grads.append(torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse)))
    for clean, poisoned, infinite in zip(*grads, strict=True):
        assert clean.isfinite().all() and clean.abs().sum() > 0
        assert clean.equal(poisoned) and clean.equal(infinite)
    assert not grads[0][0][:, :, [2, 5]].any()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_infinite_values_stay_infinite(cpu, dtype):
    q, k = (torch.randn(1, 1, 33, 24).to(dtype) for _ in range(2))
    v = torch.randn(1, 1, 33, 24).to(dtype)
    v[0, 0, 5, 3] = float("inf")
    out = ft.attention(q, k, v)
    assert (out[..., 3] == float("inf")).all()
    assert out[..., 4:].isfinite().all() and out[..., :3].isfinite().all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_keys_outside_are_never_read(backend, dtype):
    """NaN before key_starts and from key_lengths on changes no bit of anything."""
    starts, lengths = torch.tensor([0, 5, 60]), torch.tensor([64, 70, 130])
    q, k, v = qkv(B=3, T=33, S=130, D=24, dtype=dtype)
    outside = torch.arange(130) < starts[:, None]
    outside |= torch.arange(130) >= lengths[:, None]

    def run(fill):
        inputs = {"query": q, "key_starts": starts, "key_lengths": lengths}
        inputs["key"], inputs["value"] = (
            x.masked_fill(outside[:, None, :, None], fill) for x in (k, v)
        )
        return testing.evaluate("attention", inputs, ("query", "key", "value"))

    for clean, poisoned in zip(run(0.0).values(), run(NAN).values(), strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 63, 8), (65, 65, 40), (70, 333, 64)], ids=str)
def test_nothing_around_the_inputs_is_read(cpu, shape, dtype):
    T, S, D = shape
    q, k, v = qkv(T=T, S=S, D=D, dtype=dtype)
    bias = draw(2, T, S, dtype=dtype)
    inputs = {"query": q, "key": k, "value": v, "bias": bias, "causal": True}
    around = inputs | {n: surrounded(inputs[n]) for n in ("query", "key", "value", "bias")}
    expected = testing.evaluate("attention", inputs, ("query", "key", "value"))
    got = testing.evaluate("attention", around, ("query", "key", "value"))
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


def test_memory_layout(backend):
    q, k, v = (x.requires_grad_() for x in qkv())
    out, lse = ft.attention(q, k, v, return_lse=True)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    if backend == "cpu":
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(x.transpose(1, 2).is_contiguous() for x in grads)
    cu = torch.tensor([0, 4, 9])
    packed = draw(9, 2, 16)
    assert ft.attention_varlen(packed, packed, packed, cu, cu, 5, 5).is_contiguous()


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape_and_mask(kernels, dtype, data):
    integers = st.integers
    B, H = data.draw(integers(1, 3)), data.draw(integers(1, 2))
    T, S = data.draw(integers(1, 140)), data.draw(integers(1, 140))
    D = data.draw(st.sampled_from([1, 3, 8, 16, 31, 40, 64, 72]))
    torch.manual_seed(data.draw(integers(0, 2**31)))
    q, k, v = qkv(B, H, T, S, D, dtype=dtype)
    inputs = {"query": q, "key": k, "value": v, "return_lse": True}
    if data.draw(st.booleans()):
        inputs["causal"] = True
        if data.draw(st.booleans()):
            inputs["causal_offset"] = data.draw(integers(-T, S))
    for name in ("key_starts", "key_lengths"):
        if data.draw(st.booleans()):
            inputs[name] = torch.tensor(data.draw(st.lists(integers(0, S), min_size=B, max_size=B)))
    shape = [data.draw(st.sampled_from([1, n])) for n in (B, H, T, S)]
    kind = data.draw(st.sampled_from(["none", "bool", "additive"]))
    if kind != "none":
        inputs["bias"] = torch.rand(shape) < 0.7 if kind == "bool" else draw(*shape, dtype=dtype)
    if data.draw(st.booleans()):
        inputs["dropout_p"] = data.draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
        inputs["seed"] = torch.tensor(data.draw(integers(0, 2**63 - 1)))
    testing.check("attention", inputs, ("query", "key", "value"))


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_packing(kernels, dtype, data):
    k_lengths = data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=5))
    size = len(k_lengths)
    others = st.lists(st.integers(0, 100), min_size=size, max_size=size)
    q_lengths = k_lengths if data.draw(st.booleans()) else data.draw(others)
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    H, D = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 8, 24, 40, 64]))
    T, S = max(q_lengths), max(k_lengths)
    inputs = {"query": draw(sum(q_lengths), H, D, dtype=dtype)}
    inputs |= {name: draw(sum(k_lengths), H, D, dtype=dtype) for name in ("key", "value")}
    inputs |= {"max_seqlen_q": T, "max_seqlen_k": S, "return_lse": True}
    inputs |= {"cu_seqlens_q": testing.offsets(q_lengths)}
    inputs |= {"cu_seqlens_k": testing.offsets(k_lengths).int()}
    inputs["causal"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        shape = [data.draw(st.sampled_from([1, n])) for n in (size, H, T, S)]
        inputs["bias"] = draw(*shape, dtype=dtype)
    if data.draw(st.booleans()):
        inputs |= {"dropout_p": 0.3, "seed": torch.tensor(data.draw(st.integers(0, 2**63 - 1)))}
    testing.check("attention_varlen", inputs, ("query", "key", "value"))
