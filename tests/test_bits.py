"""CPU results are the same bits at every run, thread count and place in a batch."""

import pytest
import torch

import fast_transformer as ft
from fast_transformer import testing

CASES = [case for case in testing.CASES if case.use == "test"]
WRT = ("query", "key", "value")


def assert_same(got, expected):
    for name, x in expected.items():
        assert torch.equal(got[name], x), f"{name} differs in {int((got[name] != x).sum())} places"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.name}")
def test_every_run_and_thread_count(cpu, threads, case):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(dtype)
        threads(1)
        alone = testing.evaluate(case.op, inputs, case.wrt)
        for count in (1, 2, 5):
            threads(count)
            assert_same(testing.evaluate(case.op, inputs, case.wrt), alone)


OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (40, 9)},
    "window-causal": {"window": (100, -1), "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "softcap": {"softcap": 2.0},
    "all": {
        "window": (80, 30),
        "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0]),
        "softcap": 5.0,
        "causal": True,
    },
}


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [[65, 3, 130], [1, 70], [333, 333, 12]], ids=str)
def test_packed_is_alone(cpu, lengths, kv_heads, options, dtype):
    """A packed sequence gives bitwise what it gives alone, and what it gives behind padding."""
    options = OPTIONS[options]
    cu, longest = testing.offsets(lengths), max(lengths)
    D, value_dim = 40, 40 if kv_heads == 4 else 24
    widths = (4, D), (kv_heads, D), (kv_heads, value_dim)
    q, k, v = (torch.randn(sum(lengths), *width).to(dtype) for width in widths)
    weights = torch.randn(sum(lengths), 4, value_dim).to(dtype)

    def gradients(out, leaves, weights):
        return (out.detach(), *torch.autograd.grad(out, leaves, weights))

    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ft.attention_varlen(*leaves, cu, cu, longest, longest, **options)
    packed = gradients(out, leaves, weights)
    for b in range(len(lengths)):
        span = slice(cu[b], cu[b + 1])
        alone = [x.detach()[span].transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
        out = ft.attention(*alone, **options)
        single = gradients(out, alone, weights[span].transpose(0, 1)[None])
        for x, y in zip(packed, single, strict=True):
            assert torch.equal(x[span].transpose(0, 1)[None], y)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_group_is_its_heads(cpu, dtype):
    """Sharing keys changes no bit of what a head gives with a copy of its own."""
    q, k, v = (torch.randn(2, heads, 130, 24).to(dtype) for heads in (6, 2, 2))
    copies = (x.repeat_interleave(3, 1) for x in (k, v))
    shared = ft.attention(q, k, v, causal=True, return_lse=True)
    for x, y in zip(shared, ft.attention(q, *copies, causal=True, return_lse=True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_relative_batch_is_its_items(cpu, dtype):
    B, H, T, S, D = 3, 2, 65, 130, 24
    shapes = {"query": (B, H, T, D), "key": (B, H, S, D), "value": (B, H, S, D)}
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    shared = {"position_key": torch.randn(T + S, H, D).to(dtype)}
    shared["distance_bias"] = torch.randn(H, T + S)
    together = ft.relative_attention(**inputs, **shared)
    for b in range(B):
        item = {name: x[b : b + 1] for name, x in inputs.items()}
        assert torch.equal(ft.relative_attention(**item, **shared), together[b : b + 1])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 65, 130])
def test_a_batch_is_its_items(cpu, T, dtype):
    inputs = {n: torch.randn(3, 2, T, 24).to(dtype) for n in WRT} | {"causal": True}
    together = ft.attention(**inputs)
    for b in range(3):
        for h in range(2):
            item = {n: inputs[n][b : b + 1, h : h + 1] for n in WRT} | {"causal": True}
            assert torch.equal(ft.attention(**item), together[b : b + 1, h : h + 1])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_length_is_what_counts_not_padding(cpu, dtype):
    """key_lengths leaves the bits of a shorter key tensor, whatever the tensor's own length."""
    q, k, v = (torch.randn(1, 2, n, 32).to(dtype) for n in (50, 400, 400))
    for length in (1, 63, 130):
        masked = ft.attention(q, k, v, key_lengths=torch.tensor([length]))
        assert torch.equal(masked, ft.attention(q, k[:, :, :length], v[:, :, :length]))


def test_hidden_nan_is_where_threads_do_not_matter(cpu, threads):
    """A NaN value that no row sees may share a register with one that is seen, but always does."""
    q, k = torch.randn(1, 1, 384, 32), torch.randn(1, 1, 385, 32)
    v = torch.randn(1, 1, 385, 32)
    v[0, 0, 193] = float("nan")
    places = []
    for count in (1, 2, 5):
        threads(count)
        out = ft.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
        places.append(out.isnan())
    assert places[0].equal(places[1]) and places[0].equal(places[2])
