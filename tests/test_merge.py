"""merge_attention: shards of the keys give what all of them give."""

import pytest
import torch

import fast_transformer as ft
from fast_transformer import testing


def shards(sizes, dtype=torch.float32, **options):
    """Attention over all keys, and over each of the shards, with the inputs."""
    q, k, v = (torch.randn(2, 3, n, 8).to(dtype) for n in (5, sum(sizes), sum(sizes)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    whole = ft.attention(*inputs, return_lse=True, **options)
    pieces = zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)
    parts = [ft.attention(q, *piece, return_lse=True, **options) for piece in pieces]
    return inputs, whole, tuple(zip(*parts, strict=True))


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 2], [4, 0, 3]], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_shards_are_the_whole(backend, sizes, stacked):
    inputs, whole, (outs, lses) = shards(sizes)
    if stacked:
        outs, lses = torch.stack(outs), torch.stack(lses)
    merged = ft.merge_attention(outs, lses)
    torch.testing.assert_close(merged, whole)
    weights = [torch.randn_like(x) for x in whole]
    torch.testing.assert_close(
        torch.autograd.grad(merged, inputs, weights), torch.autograd.grad(whole, inputs, weights)
    )


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (4, 1)}, {"alibi_slopes": torch.tensor([1.0, 0.5, 0.1])}],
    ids=lambda options: next(iter(options)),
)
def test_shards_along_one_diagonal(backend, options):
    """Each is told where the diagonal of the whole runs among its own keys."""
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 12, 12))
    whole = ft.attention(q, k, v, return_lse=True, **options)
    first = 0
    parts = []
    for keys, values in zip(k.split([7, 3, 2], 2), v.split([7, 3, 2], 2), strict=True):
        offset = 12 - 5 - first
        parts.append(
            ft.attention(q, keys, values, causal_offset=offset, return_lse=True, **options)
        )
        first += keys.shape[2]
    torch.testing.assert_close(ft.merge_attention(*zip(*parts, strict=True)), whole)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dtypes(backend, dtype):
    _, whole, (outs, lses) = shards([60, 70], dtype)
    out, lse = ft.merge_attention(list(outs), list(lses))
    assert out.dtype == dtype and lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, whole[0], rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)


def test_shards_that_a_mask_empties(backend):
    """Rows that see no key of one shard, and one row that sees none of any."""
    allowed = torch.ones(5, 7, dtype=torch.bool)
    allowed[0, :3] = allowed[1, 3:] = allowed[4] = False
    inputs = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 7, 7)]
    q, k, v = inputs
    whole = ft.attention(q, k, v, bias=allowed, return_lse=True)
    parts = [
        ft.attention(q, k[:, :, s], v[:, :, s], bias=allowed[:, s], return_lse=True)
        for s in (slice(3), slice(3, 7))
    ]
    merged = ft.merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, whole)
    assert (merged[0][:, :, 4] == 0).all() and (merged[1][:, :, 4] == -torch.inf).all()
    weights = [torch.randn_like(x) for x in whole]
    grads = torch.autograd.grad(merged, inputs, weights)
    assert all(x.isfinite().all() for x in grads)
    torch.testing.assert_close(grads, torch.autograd.grad(whole, inputs, weights))


def test_a_shard_without_keys_counts_for_nothing():
    """Whatever its rows hold, as memory that nobody wrote."""
    outs, lses = torch.randn(2, 1, 1, 3, 4), torch.randn(2, 1, 1, 3)
    outs[1, ..., 0, :], lses[1, ..., 0] = float("nan"), -torch.inf
    lses[:, ..., 2] = -torch.inf
    leaves = outs.requires_grad_(), lses.requires_grad_()
    out, lse = ft.merge_attention(*leaves)
    assert torch.equal(out[..., 0, :], outs[0, ..., 0, :])
    assert torch.equal(lse[..., 0], lses[0, ..., 0])
    assert (out[..., 2, :] == 0).all() and lse[..., 2] == -torch.inf
    for x in torch.autograd.grad((out.sum(), lse.exp().sum()), leaves):
        assert x.isfinite().all() and (x[1, 0, 0, 0] == 0).all() and (x[:, 0, 0, 2] == 0).all()


def test_large_logsumexps_do_not_overflow():
    outs, lses = torch.randn(3, 2, 4), torch.tensor([[1e4, -1e4], [1e4, -2e4], [-1e4, -3e4]])
    out, lse = ft.merge_attention(outs, lses)
    torch.testing.assert_close(out[0], (outs[0, 0] + outs[1, 0]) / 2)
    torch.testing.assert_close(out[1], outs[0, 1])
    assert lse.isfinite().all()


def test_gradcheck():
    outs = torch.randn(3, 1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ft.merge_attention, (outs, lses))
    assert torch.autograd.gradgradcheck(ft.merge_attention, (outs, lses))


def test_compiles_whole():
    outs, lses = torch.randn(2, 1, 2, 3, 4), torch.randn(2, 1, 2, 3)
    compiled = torch.compile(ft.merge_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outs, lses), ft.merge_attention(outs, lses))


X = torch.zeros(2, 3, 4)
ERRORS = [
    (
        (3.0, X[..., 0]),
        TypeError,
        "outs must be a tensor or a sequence of tensors, got float.",
    ),
    (([X, 3], X), TypeError, "outs must be a tensor or a sequence of tensors, got list."),
    ((X, torch.zeros(())), ValueError, "lses has no dimension; the first is the shards'."),
    (([], []), ValueError, "outs holds no shard; it must hold at least one."),
    ((X[:0], X[:0, :, 0]), ValueError, "outs holds no shard; it must hold at least one."),
    (
        ([X, X[:1]], X),
        ValueError,
        "outs[1] has shape (1, 3, 4) but outs[0] has (2, 3, 4); they must match.",
    ),
    (
        ([X, X.half()], X),
        TypeError,
        "outs[1] has dtype float16 but outs[0] has float32; they must match.",
    ),
    (
        (X.long(), X[..., 0]),
        TypeError,
        "outs has dtype int64; accepted are float32, bfloat16, float16 and float64.",
    ),
    (
        (X.half(), X[..., 0].half()),
        TypeError,
        "lses has dtype float16; accepted is float32, and float64 where outs is float64.",
    ),
    (
        (X, X),
        ValueError,
        "lses has shape (2, 3, 4); outs, which has (2, 3, 4), asks for (2, 3).",
    ),
    (
        (X, X[..., 0].to("meta")),
        ValueError,
        "lses is on device meta but outs is on cpu; they must match.",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(arguments, error, message):
    with pytest.raises(error) as raised:
        ft.merge_attention(*arguments)
    assert str(raised.value) == f"merge_attention: {message}"
