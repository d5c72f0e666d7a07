"""relative_attention: against the papers' models in transformers, and kernels against reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast_transformer as ft
from fast_transformer import testing

F64 = torch.float64
WRT = ("query", "key", "value")


def qkv(B=2, H=3, T=5, S=7, D=4, dtype=torch.float32):
    return tuple(torch.randn(B, H, n, D).to(dtype) for n in (T, S, S))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("relative", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype), case.wrt)


def loops(query, key, value, position_zero, made):
    """The docstring's score, a pair at a time."""
    (B, H, T, D), S = query.shape, key.shape[2]
    scores = torch.zeros(B, H, T, S, dtype=F64)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                for j in range(S):
                    p = position_zero + j - i
                    q, s = (
                        query[b, h, i],
                        int(made["query_segments"][b, i] != made["key_segments"][b, j]),
                    )
                    score = (q + made["content_bias"][h]) @ key[b, h, j]
                    score += (q + made["position_bias"][h]) @ made["position_key"][p, h]
                    score += (q + made["segment_bias"][h]) @ made["segment_key"][s, h]
                    scores[b, h, i, j] = score / D**0.5 + made["distance_bias"][h, p]
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def everything(B=2, H=3, T=5, S=7, D=4, dtype=F64):
    shapes = {"position_key": (T + S, H, D), "segment_key": (2, H, D), "distance_bias": (H, T + S)}
    shapes |= dict.fromkeys(("content_bias", "position_bias", "segment_bias"), (H, D))
    made = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    made["query_segments"] = torch.randint(0, 3, (B, T))
    made["key_segments"] = torch.randint(0, 3, (B, S), dtype=torch.int32)
    return made


def test_reference_is_the_loops():
    tensors, made = qkv(dtype=F64), everything()
    with ft.backend("reference"):
        got = ft.relative_attention(*tensors, **made, return_lse=True)
    torch.testing.assert_close(got, loops(*tensors, 5, made))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (2, 1), "softcap": 0.7}, {"alibi_slopes": torch.rand(2)},
     {"key_lengths": torch.tensor([2])}],
    ids=str,
)  # fmt: skip
def test_reference_gradcheck(options):
    shape = {"B": 1, "H": 2, "T": 2, "S": 3, "D": 2}
    made = everything(**shape)
    segments = {name: made.pop(name) for name in ("query_segments", "key_segments")}
    inputs = [x.requires_grad_() for x in (*qkv(**shape, dtype=F64), *made.values())]

    def call(q, k, v, *rest):
        named = dict(zip(made, rest, strict=True))
        return ft.relative_attention(q, k, v, **named, **segments, **options)

    assert torch.autograd.gradcheck(call, inputs)


def test_without_any_term_it_is_attention(backend):
    tensors = qkv()
    options = {"window": (2, 1), "bias": torch.randn(5, 7), "alibi_slopes": torch.rand(3)}
    assert torch.equal(
        ft.relative_attention(*tensors, **options), ft.attention(*tensors, **options)
    )


def xlnet(H=2, D=8):
    modeling = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    from transformers import XLNetConfig

    config = XLNetConfig(d_model=H * D, n_head=H, d_inner=8, n_layer=1, vocab_size=8, dropout=0.0)
    module = modeling.XLNetRelativeAttention(config).to(F64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return modeling, module


def of_xlnet(module):
    return {
        "content_bias": module.r_w_bias,
        "position_bias": module.r_r_bias,
        "segment_bias": module.r_s_bias,
        "segment_key": module.seg_embed,
    }


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("memory", [0, 3])
def test_xlnets_two_streams(backend, memory, dtype):
    """Content and query stream over the same keys, under the masks of a permutation."""
    if backend == "cpu" and dtype == F64:
        pytest.skip("float64 is the reference's")
    _, module = xlnet()
    module = module.to(dtype)
    B, H, T, D = 2, 2, 6, 8
    S = memory + T
    content, two = (torch.randn(T, B, H, D, dtype=dtype, requires_grad=True) for _ in range(2))
    k, v = (torch.randn(S, B, H, D, dtype=dtype, requires_grad=True) for _ in range(2))
    position_key = torch.randn(T + S, H, D, dtype=dtype, requires_grad=True)
    segments = torch.randint(0, 2, (B, S))
    differ = segments[:, memory:, None] != segments[:, None]  # (B, T, S)
    theirs_segments = torch.stack([~differ, differ], -1).permute(1, 2, 0, 3).to(dtype)
    order = torch.stack([torch.randperm(T) for _ in range(B)])
    behind = torch.ones(B, T, S, dtype=torch.bool)
    behind[..., memory:] = order[:, None] < order[..., None]  # the query stream
    itself = behind.clone()
    itself[..., memory:] |= torch.eye(T, dtype=torch.bool)  # the content stream sees itself too
    behind[..., 0] = True  # a row that sees nothing differs: zeros here, a mean there

    leaves = [content, two, k, v, position_key, *of_xlnet(module).values()]
    theirs, ours = [], []
    for query, allowed in ((content, itself), (two, behind)):
        hidden = (~allowed).to(dtype).permute(1, 2, 0)[..., None]
        rows = position_key[:, None].expand(-1, B, -1, -1)
        theirs.append(
            module.rel_attn_core(query, k, v, rows, seg_mat=theirs_segments, attn_mask=hidden)
        )
        heads = (x.permute(1, 2, 0, 3) for x in (query, k, v))
        out = ft.relative_attention(
            *heads, position_key=position_key, **of_xlnet(module),
            query_segments=segments[:, memory:], key_segments=segments, bias=allowed[:, None],
        )  # fmt: skip
        ours.append(out.permute(2, 0, 1, 3))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = [torch.randn_like(x) for x in ours]
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, weights),
        torch.autograd.grad(theirs, leaves, weights), atol=2e-5, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("memory", [0, 4])
def test_transformer_xls_layout(backend, memory):
    """Its shift, as in the authors' code: L = S, the last row for distance 0, causal."""
    B, H, T, D = 2, 3, 5, 4
    S = memory + T
    q, k, v = qkv(B, H, T, S, D)
    u, w, r = torch.randn(H, D), torch.randn(H, D), torch.randn(S, H, D)
    by_row = (q + w[:, None]) @ r.permute(1, 2, 0)
    padded = torch.cat([by_row.new_zeros(B, H, T, 1), by_row], -1)
    shifted = padded.view(B, H, S + 1, T)[:, :, 1:].reshape(B, H, T, S)
    scores = ((q + u[:, None]) @ k.mT + shifted) * D**-0.5
    hidden = torch.ones(T, S).triu(1 + memory).bool()
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    out = ft.relative_attention(
        q, k, v, position_key=r, position_zero=T - 1, content_bias=u, position_bias=w, causal=True
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets", [(32, 128), (8, 20), (6, 50)])
def test_buckets_are_t5s(bidirectional, buckets):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-600, 601)
    expected = modeling.T5Attention._relative_position_bucket(distance, bidirectional, *buckets)
    num_buckets, max_distance = buckets
    options = {"num_buckets": num_buckets, "max_distance": max_distance}
    found = ft.t5_buckets(distance, bidirectional=bidirectional, **options)
    assert torch.equal(found, expected) and found.dtype == torch.int64
    small = ft.t5_buckets(distance.view(1201, 1).short(), bidirectional=bidirectional, **options)
    assert torch.equal(small, expected[:, None])


@pytest.mark.parametrize("decoder", [False, True])
def test_t5s_bias(backend, decoder):
    """The (T × S × heads) table of T5 is never formed; its gradient reaches the few buckets."""
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    from transformers import T5Config

    config = T5Config(d_model=12, d_kv=4, num_heads=3, is_decoder=decoder)
    module = modeling.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    torch.nn.init.normal_(module.relative_attention_bias.weight)
    T = S = 37
    q, k, v = (x.requires_grad_() for x in qkv(2, 3, T, S, 4))
    table = module.relative_attention_bias.weight
    buckets = ft.t5_buckets(torch.arange(-(T - 1), S), bidirectional=not decoder)
    ours = ft.relative_attention(
        q, k, v, distance_bias=table[buckets].T, position_zero=T - 1, scale=1.0, causal=decoder
    )
    bias = module.compute_bias(T, S)
    scores = q @ k.mT + bias
    if decoder:
        scores = scores.masked_fill(torch.ones(T, S).triu(1).bool(), -torch.inf)
    theirs = scores.softmax(-1) @ v
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (q, k, v, table), weights),
        torch.autograd.grad(theirs, (q, k, v, table), weights), atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_only_what_needs_a_gradient_gets_one(backend):
    made = everything(dtype=torch.float32)
    floating = [name for name, x in made.items() if x.is_floating_point()]
    for needed in floating:
        leaves = {
            n: x.clone().requires_grad_(n == needed) for n, x in made.items() if n in floating
        }
        out = ft.relative_attention(*qkv(), **(made | leaves))
        out.square().sum().backward()
        assert [n for n, x in leaves.items() if x.grad is not None] == [needed]
        assert leaves[needed].grad.abs().sum() > 0


def test_one_distance_bias_for_all_heads(cpu):
    inputs = dict(zip(WRT, qkv(T=65, S=70), strict=True)) | {"return_lse": True}
    for dtype in (torch.float32, torch.bfloat16):
        low = {n: x.to(dtype) if n in WRT else x for n, x in inputs.items()}
        low["distance_bias"] = torch.randn(1, 135).to(dtype)
        testing.check("relative_attention", low, (*WRT, "distance_bias"))


@pytest.mark.parametrize("term", ["positions", "distance"])
def test_rows_that_no_pair_asks_for_change_nothing(backend, term):
    """NaN there changes no bit, and gets no gradient."""
    T, S = 37, 70
    q, k, v = qkv(T=T, S=S, D=8)
    needed = slice(T + (S - T) - 9, T + (S - T) + 1)  # window (9, …), causal
    shape, dimension = ((T + S, 3, 8), 0) if term == "positions" else ((3, T + S), 1)
    clean = torch.randn(shape)
    poisoned = torch.full(shape, float("nan"))
    for x in (clean, poisoned):
        rows = x.movedim(dimension, 0)
        rows[needed] = clean.movedim(dimension, 0)[needed]
    results = []
    for x in (clean, poisoned):
        x.requires_grad_()
        name = "position_key" if term == "positions" else "distance_bias"
        out = ft.relative_attention(
            q, k, v, causal=True, window=(9, -1), position_zero=T, **{name: x}
        )
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    outside = torch.ones(T + S, dtype=torch.bool)
    outside[needed] = False
    assert (results[0][1].movedim(dimension, 0)[outside] == 0).all()


@pytest.mark.parametrize("zero", [0, 3, 50])
def test_any_zero(cpu, zero):
    """Only the rows that a window asks for, wherever the table begins."""
    T, S = 65, 65
    inputs = dict(zip(WRT, qkv(T=T, S=S, D=8), strict=True)) | {"return_lse": True}
    inputs |= {
        "window": (zero, 5),
        "position_zero": zero,
        "position_key": torch.randn(zero + 6, 3, 8),
    }
    testing.check("relative_attention", inputs, (*WRT, "position_key"))


@pytest.mark.parametrize("shape", [(0, 3, 3, 4), (2, 3, 0, 4), (2, 3, 3, 0)], ids=str)
def test_empty(backend, shape):
    B, H, T, S = shape
    made = everything(B, H, T, S, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in made.values() if x.is_floating_point()]
    out, lse = ft.relative_attention(*qkv(B, H, T, S), **made, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all((x == 0).all() and x.shape == y.shape for x, y in zip(grads, leaves, strict=True))


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_combination(kernels, dtype, data):
    integers, some = st.integers, st.booleans()
    B, H = data.draw(integers(1, 2)), data.draw(integers(1, 3))
    T, S = data.draw(integers(1, 80)), data.draw(integers(1, 100))
    D = data.draw(st.sampled_from([1, 3, 8, 24, 40, 64]))
    torch.manual_seed(data.draw(integers(0, 2**31)))
    inputs = dict(zip(WRT, qkv(B, H, T, S, D, dtype), strict=True)) | {"return_lse": True}
    made = everything(B, H, T, S, D, dtype)
    groups = {
        "position_key": ("position_bias",),
        "segment_key": ("segment_bias", "query_segments", "key_segments"),
        "distance_bias": (),
        "content_bias": (),
    }
    for name, others in groups.items():
        if not data.draw(some):
            del made[name]
            for other in others:
                del made[other]
    wrt = (*WRT, *(name for name, x in made.items() if x.is_floating_point()))
    inputs |= made
    inputs["causal"] = data.draw(some)
    if data.draw(some):
        inputs["window"] = tuple(data.draw(st.sampled_from([-1, 0, 5, 64])) for _ in range(2))
    if data.draw(some):
        inputs["alibi_slopes"] = torch.rand(H)
    if data.draw(some):
        inputs["softcap"] = data.draw(st.sampled_from([0.5, 20.0]))
    if data.draw(some):
        inputs["key_lengths"] = torch.tensor(
            data.draw(st.lists(integers(0, S), min_size=B, max_size=B))
        )
    if data.draw(some):
        inputs |= {"dropout_p": 0.3, "seed": torch.tensor(data.draw(integers(0, 2**63 - 1)))}
    if data.draw(some):
        inputs["bias"] = torch.randn(T, S).to(dtype)
        wrt = (*wrt, "bias")
    testing.check("relative_attention", inputs, wrt)
