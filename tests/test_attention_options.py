"""Attention's options: against loops over every pair, against PyTorch, kernels against both."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import fast_transformer as ft
from fast_transformer import testing

NAN = float("nan")
WRT = ("query", "key", "value")
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0])


def qkv(B=2, H=4, T=9, S=13, D=16, kv_heads=None, value_dim=None, dtype=torch.float32):
    kv_heads, value_dim = kv_heads or H, value_dim or D
    shapes = (B, H, T, D), (B, kv_heads, S, D), (B, kv_heads, S, value_dim)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def named(tensors, **options):
    return dict(zip(WRT, tensors, strict=True)) | {"return_lse": True} | options


def loops(query, key, value, *, causal=False, causal_offset=None, window=(-1, -1), bias=None,
          key_starts=None, key_lengths=None, alibi_slopes=None, softcap=0.0):  # fmt: skip
    """The text of docs/attention.md, a pair at a time."""
    (B, H, T, D), S = query.shape, key.shape[2]
    out, lse = query.new_zeros(B, H, T, value.shape[3]), query.new_full((B, H, T), -math.inf)
    diagonal = S - T if causal_offset is None else causal_offset
    left, right = (math.inf if side == -1 else side for side in window)
    for b in range(B):
        for h in range(H):
            of_group = h // (H // key.shape[1])
            for i in range(T):
                scores, seen = [], []
                for j in range(S):
                    if not i + diagonal - left <= j <= i + diagonal + right:
                        continue
                    if causal and j > i + diagonal:
                        continue
                    if key_starts is not None and j < key_starts[b]:
                        continue
                    if key_lengths is not None and j >= key_lengths[b]:
                        continue
                    score = sum(x * y for x, y in zip(query[b, h, i], key[b, of_group, j]))  # noqa: B905
                    score = score.item() / math.sqrt(D)
                    if softcap > 0:
                        score = softcap * math.tanh(score / softcap)
                    if bias is not None:
                        score += bias[b, h, i, j].item()
                    if alibi_slopes is not None:
                        slopes = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b]
                        score -= slopes[h].item() * abs(i + diagonal - j)
                    scores.append(score)
                    seen.append(j)
                if not seen:
                    continue
                total = sum(map(math.exp, scores))
                lse[b, h, i] = math.log(total)
                for j, score in zip(seen, scores, strict=True):
                    out[b, h, i] += math.exp(score) / total * value[b, of_group, j]
    return out, lse


OPTIONS = {
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1, "causal": True},
    "value_dim": {"value_dim": 3},
    "window": {"window": (2, 1)},
    "window-left": {"window": (0, -1)},
    "window-right": {"window": (-1, 0), "causal_offset": -2},
    "window-causal": {"window": (3, 5), "causal": True, "causal_offset": 1},
    "window-outside": {"window": (1, 1), "causal_offset": 9},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi-batch": {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)])},
    "alibi-offset": {"alibi_slopes": SLOPES, "causal_offset": 2},
    "softcap": {"softcap": 0.5},
    "all": {
        "kv_heads": 2, "value_dim": 3, "window": (2, 3), "alibi_slopes": SLOPES, "softcap": 0.8,
        "causal": True, "causal_offset": 1, "key_lengths": torch.tensor([5, 2]),
        "key_starts": torch.tensor([1, 0]), "bias": True,
    },
}  # fmt: skip


def small(options, dtype=torch.float64):
    """Tensors of a small problem, and the options without their shapes."""
    options = dict(options)
    shape = {name: options.pop(name) for name in ("kv_heads", "value_dim") if name in options}
    tensors = qkv(B=2, H=4, T=4, S=6, D=2, dtype=dtype, **shape)
    if options.pop("bias", False):
        options["bias"] = torch.randn(2, 4, 4, 6).to(dtype)
    return tensors, options


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_the_loops(name):
    tensors, options = small(OPTIONS[name])
    with ft.backend("reference"):
        out, lse = ft.attention(*tensors, return_lse=True, **options)
    torch.testing.assert_close((out, lse), loops(*tensors, **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradcheck(name):
    tensors, options = small(OPTIONS[name])
    bias = options.pop("bias", torch.randn(4, 6, dtype=torch.float64))
    inputs = [x.requires_grad_() for x in (*tensors, bias)]

    def call(q, k, v, bias):
        return ft.attention(q, k, v, bias=bias, return_lse="window" not in options, **options)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("value_dim", [5, 16])
def test_reference_is_pytorchs(kv_heads, value_dim):
    q, k, v = (
        x.requires_grad_() for x in qkv(kv_heads=kv_heads, value_dim=value_dim, dtype=torch.float64)
    )
    ahead = torch.arange(13) - torch.arange(9)[:, None] - 4
    mask = torch.zeros(4, 9, 13).masked_fill((ahead < -3) | (ahead > 2), -torch.inf)
    mask = (mask - SLOPES[:, None, None] * ahead.abs()).double()
    with ft.backend("reference"):
        out = ft.attention(q, k, v, window=(3, 2), alibi_slopes=SLOPES)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), weights),
        torch.autograd.grad(expected, (q, k, v), weights),
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_varlen_is_each_sequence_alone(name):
    _, options = small(OPTIONS[name])
    for no_more in ("key_lengths", "key_starts", "bias"):
        options.pop(no_more, None)
    shape = {n: OPTIONS[name][n] for n in ("kv_heads", "value_dim") if n in OPTIONS[name]}
    q_lengths, k_lengths = [3, 5], [6, 2]
    cu_q, cu_k = testing.offsets(q_lengths), testing.offsets(k_lengths)
    q, _, _ = qkv(B=1, T=8, D=8, dtype=torch.float64)
    _, k, v = qkv(B=1, S=8, D=8, dtype=torch.float64, **shape)
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    slopes = options.pop("alibi_slopes", None)
    with ft.backend("reference"):
        out, lse = ft.attention_varlen(
            *packed, cu_q, cu_k, 5, 6, return_lse=True, alibi_slopes=slopes, **options
        )
        for b in range(2):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
            expected, expected_lse = ft.attention(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], return_lse=True, alibi_slopes=own,
                **options,
            )  # fmt: skip
            torch.testing.assert_close(out[rows], expected[0].transpose(0, 1))
            torch.testing.assert_close(lse[:, rows], expected_lse[0])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (13,), (9, 1), (9, 13), (2, 1, 1, 1), (2, 1, 1, 13), (4, 1, 13),
              (1, 4, 9, 13), (2, 4, 9, 13), (2, 4, 1, 1), (2, 1, 9, 13)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("own", ["query's", "float32"])
def test_gradient_of_a_broadcast_bias(cpu, shape, dtype, own):
    bias = torch.randn(shape).to(dtype if own == "query's" else torch.float32)
    inputs = named(qkv(dtype=dtype), bias=bias)
    testing.check("attention", inputs, (*WRT, "bias"))


def test_gradient_of_a_bias_alone(backend):
    bias = torch.randn(2, 1, 9, 13, requires_grad=True)
    out = ft.attention(*qkv(), bias=bias)
    assert out.requires_grad
    out.square().sum().backward()
    assert bias.grad.shape == bias.shape and bias.grad.abs().sum() > 0


def test_gradient_of_a_view_as_bias(backend):
    """A table from which a bias is expanded and transposed gets its sum."""
    table = torch.randn(13, 9, requires_grad=True)
    q, k, v = qkv()
    grads = []
    for bias in (table.mT, table.mT.expand(2, 4, 9, 13), table.mT.contiguous()):
        out = ft.attention(q, k, v, bias=bias)
        grads.append(torch.autograd.grad(out.square().sum(), table)[0])
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])


def test_gradient_of_a_bias_where_nothing_is_seen(backend):
    """Zeros where a mask hides, whatever the bias says there."""
    bias = torch.randn(1, 1, 9, 13)
    bias[..., 10:] = NAN
    bias.requires_grad_()
    out = ft.attention(*qkv(), bias=bias, key_lengths=torch.tensor([10, 4]), window=(3, 2))
    out.square().sum().backward()
    ahead = torch.arange(13) - torch.arange(9)[:, None] - 4
    hidden = (ahead < -3) | (ahead > 2) | (torch.arange(13) >= 10)
    assert (bias.grad[0, 0][hidden] == 0).all()
    assert bias.grad.isfinite().all() and bias.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("window", [(0, 0), (3, -1), (-1, 0), (100, 2), (64, 64)], ids=str)
def test_rows_without_a_key_by_window(backend, window, dtype):
    """Queries far behind the last key: the window ends before them, or begins after."""
    inputs = [x.requires_grad_() for x in qkv(T=300, S=70, D=24, dtype=dtype)]
    out, lse = ft.attention(*inputs, window=window, causal_offset=0, return_lse=True)
    grads = torch.autograd.grad((out, lse), inputs, (torch.randn_like(out), torch.randn_like(lse)))
    left, right = (10**6 if side == -1 else side for side in window)
    row = torch.arange(300)[:, None]
    seen = ((torch.arange(70) >= row - left) & (torch.arange(70) <= row + right)).any(-1)
    assert torch.equal(lse.isfinite(), seen.expand_as(lse))
    assert (out[:, :, ~seen] == 0).all() and (grads[0][:, :, ~seen] == 0).all()
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_keys_outside_are_never_read_through_a_window(backend, dtype):
    """NaN outside [key_starts, key_lengths) changes no bit, whatever window and slopes say."""
    starts, lengths = torch.tensor([0, 5, 60]), torch.tensor([64, 70, 130])
    q, k, v = qkv(B=3, T=33, S=130, D=24, kv_heads=2, value_dim=8, dtype=dtype)
    outside = torch.arange(130) < starts[:, None]
    outside |= torch.arange(130) >= lengths[:, None]
    options = {"window": (70, 3), "alibi_slopes": SLOPES, "softcap": 5.0, "causal_offset": 20}

    def run(fill):
        poisoned = (x.masked_fill(outside[:, None, :, None], fill) for x in (k, v))
        inputs = named((q, *poisoned), key_starts=starts, key_lengths=lengths, **options)
        return testing.evaluate("attention", inputs, WRT)

    for clean, poisoned in zip(run(0.0).values(), run(NAN).values(), strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("window", [(7, 3), (1, 20), (33, 0), (0, 17)], ids=str)
def test_gradients_within_a_window_that_begins_anywhere(cpu, window, dtype):
    """Off the vectors' multiples, where a row of dS is looked at beside its products."""
    inputs = named(qkv(T=40, S=90, dtype=dtype), window=window, softcap=3.0)
    testing.check("attention", inputs | {"bias": torch.randn(40, 90).to(dtype)}, (*WRT, "bias"))


@pytest.mark.parametrize("window", [(2**31, 2**31), (2**31, -1), (500, 500)], ids=str)
def test_a_wide_window_is_none(backend, window):
    q, k, v = qkv(T=70, S=130)
    torch.testing.assert_close(ft.attention(q, k, v, window=window), ft.attention(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_move_the_diagonal(cpu, causal):
    q, k, v = qkv(T=70, S=130)
    lengths, starts = torch.tensor([100, 130]), torch.tensor([0, 40])
    inputs = named((q, k, v), window=(30, 20), alibi_slopes=SLOPES, causal=causal)
    testing.check("attention", inputs | {"key_lengths": lengths, "key_starts": starts}, WRT)


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_softcap_of_any_size(cpu, softcap, dtype):
    q, k, v = qkv(T=70, S=65, D=24, dtype=dtype)
    testing.check("attention", named((q * 3, k, v), softcap=softcap), WRT)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 2.0])
def test_scale_with_options(cpu, scale):
    inputs = named(qkv(), scale=scale, alibi_slopes=SLOPES, softcap=2.0, window=(5, 5))
    testing.check("attention", inputs, WRT)


def test_slopes_of_any_layout(backend):
    q, k, v = qkv()
    slopes = torch.rand(2, 4)
    expected = ft.attention(q, k, v, alibi_slopes=slopes)
    strided = torch.stack([slopes.mT, slopes.mT], -1).flatten(1)[:, ::2].mT
    torch.testing.assert_close(ft.attention(q, k, v, alibi_slopes=strided), expected)
    with torch.no_grad():
        parameter = torch.nn.Parameter(slopes)
        torch.testing.assert_close(ft.attention(q, k, v, alibi_slopes=parameter), expected)


def test_memory_layout_of_another_value_dim(backend):
    inputs = [x.requires_grad_() for x in qkv(kv_heads=2, value_dim=5)]
    out = ft.attention(*inputs)
    assert out.shape == (2, 4, 9, 5) and out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [x.shape for x in grads] == [x.shape for x in inputs]


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_any_combination(kernels, packed, dtype, data):
    integers, some = st.integers, st.booleans()
    B, kv_heads, group = (data.draw(integers(1, n)) for n in (3, 2, 3))
    H, T, S = kv_heads * group, data.draw(integers(1, 100)), data.draw(integers(1, 140))
    D, value_dim = (data.draw(st.sampled_from([1, 3, 8, 16, 31, 40, 64, 72])) for _ in range(2))
    torch.manual_seed(data.draw(integers(0, 2**31)))
    tensors = qkv(B, H, T, S, D, kv_heads, value_dim, dtype)
    inputs, wrt = named(tensors), WRT
    if packed:
        q_lengths, k_lengths = (
            data.draw(st.lists(integers(0, n), min_size=B, max_size=B)) for n in (T, S)
        )
        for name, lengths in (("query", q_lengths), ("key", k_lengths), ("value", k_lengths)):
            rows = [x[:, :n] for x, n in zip(inputs[name], lengths, strict=True)]
            inputs[name] = torch.cat(rows, 1).transpose(0, 1).contiguous()
        inputs |= {"cu_seqlens_q": testing.offsets(q_lengths), "max_seqlen_q": T}
        inputs |= {"cu_seqlens_k": testing.offsets(k_lengths), "max_seqlen_k": S}
    else:
        for name in ("key_starts", "key_lengths"):
            if data.draw(some):
                drawn = data.draw(st.lists(integers(0, S), min_size=B, max_size=B))
                inputs[name] = torch.tensor(drawn)
    inputs["causal"] = data.draw(some)
    if data.draw(some):
        sides = [-1, 0, 1, 7, 33, 64, 100]
        inputs["window"] = tuple(data.draw(st.sampled_from(sides)) for _ in range(2))
    if data.draw(some):
        inputs["alibi_slopes"] = torch.rand((B, H) if data.draw(some) else (H,))
    if data.draw(some):
        inputs["softcap"] = data.draw(st.sampled_from([0.5, 5.0, 50.0]))
    diagonal = inputs["causal"] or inputs.get("window", (-1, -1)) != (-1, -1)
    if (diagonal or "alibi_slopes" in inputs) and data.draw(some):
        inputs["causal_offset"] = data.draw(integers(-T, S))
    kind = data.draw(st.sampled_from(["none", "bool", "constant", "gradient"]))
    shape = [data.draw(st.sampled_from([1, n])) for n in (B, H, T, S)]
    if kind == "bool":
        inputs["bias"] = torch.rand(shape) < 0.7
    elif kind != "none":
        inputs["bias"] = torch.randn(shape).to(data.draw(st.sampled_from([dtype, torch.float32])))
        wrt = (*WRT, "bias") if kind == "gradient" else WRT
    if data.draw(some):
        inputs["dropout_p"] = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
        inputs["seed"] = torch.tensor(data.draw(integers(0, 2**63 - 1)))
    testing.check("attention_varlen" if packed else "attention", inputs, wrt)
