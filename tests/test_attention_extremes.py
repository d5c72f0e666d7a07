"""Attention at the edges of what floats hold: where the softmax changes its way, and long sums."""

import pytest
import torch

import fast_transformer as ft
from fast_transformer import testing

NAN = float("nan")


def qkv(B=1, H=1, T=40, S=70, D=24, dtype=torch.float32):
    return tuple(torch.randn(B, H, n, D).to(dtype) for n in (T, S, S))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_rows_with_small_and_with_large_scores(cpu, causal, dtype):
    """Where norms bound the scores no maximum is taken: blocks of rows on both sides, and at it."""
    q, k, v = qkv(T=600, S=130, D=32, dtype=dtype)
    size = torch.tensor([1.0, 30.0, 1e-3, 3.9])  # |score| log2(e) reaches about 8, 240, 0 and 32
    q = (q.float() * size.repeat_interleave(192)[:600, None]).to(dtype)
    inputs = {"query": q, "key": k, "value": v, "causal": causal, "return_lse": True}
    testing.check("attention", inputs, ("query", "key", "value"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("score", [-20.0, 0.0, 20.0])
def test_values_of_any_size(cpu, score, size, dtype):
    """Every score of a row is nearly `score`, just within what needs no maximum."""
    q, k, v = qkv(D=32, dtype=dtype)
    direction = torch.ones(32)
    q = (q.float() * 0.01 + direction * (abs(score) / 32) ** 0.5).to(dtype)
    k = (k.float() * 0.01 + direction * (abs(score) / 32) ** 0.5).to(dtype)
    scale = -1.0 if score < 0 else 1.0
    v = (v.float() * size).to(dtype)
    inputs = {"query": q * scale, "key": k, "value": v, "scale": 1.0}
    testing.check("attention", inputs, ("query", "key", "value"))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_row_of_nan_leaves_the_others(cpu, where, dtype):
    """Rows before it have large scores, those behind it small ones."""
    q, k, v = qkv(T=9, S=9, D=16, dtype=dtype)
    big, small = (q, k) if where == "query" else (k, q)
    big[:, :, :3] *= 40
    small *= 4
    expected = ft.attention(q, k, v, causal=True)
    big[:, :, 4] = NAN
    got = ft.attention(q, k, v, causal=True)
    with ft.backend("reference"):
        exact = ft.attention(q.double(), k.double(), v.double(), causal=True)
    clean = [0, 1, 2, 3] if where == "key" else [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.isnan(got[:, :, 4]).all()
    torch.testing.assert_close(got[:, :, clean], expected[:, :, clean])
    torch.testing.assert_close(got[:, :, clean].double(), exact[:, :, clean], rtol=0.02, atol=0.02)


def test_norms_of_numbers_whose_squares_vanish(cpu):
    q, k, v = qkv(T=5, S=6, D=16)
    inputs = {"query": q * 1e-25, "key": k * 100, "value": v, "scale": 1e25}
    testing.check("attention", inputs, ("value",))


@pytest.mark.parametrize("shape", [(70,), (1, 1, 1, 70), (8, 1, 1, 70), (4, 1, 70)], ids=str)
def test_gradient_of_a_bias_that_many_rows_share(cpu, shape):
    q, k, v = qkv(B=8, H=4, T=300, D=16)
    inputs = {"query": q, "key": k, "value": v, "bias": torch.randn(shape)}
    testing.check("attention", inputs, ("query", "bias"))


def test_gradient_of_a_bias_by_distance_over_a_large_batch(cpu):
    q, k, v = qkv(B=12, H=2, T=130, S=130, D=16)
    bias = torch.randn(2, 260)
    inputs = {"query": q, "key": k, "value": v, "distance_bias": bias}
    testing.check("relative_attention", inputs, ("query", "distance_bias"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_of_any_stride(backend, dtype):
    q, k, v = qkv(B=3, T=4, S=6)
    lengths = torch.tensor([5, 9, 2, 9, 6, 9], dtype=dtype)[::2]
    expected = ft.attention(q, k, v, key_lengths=lengths.clone())
    assert torch.equal(ft.attention(q, k, v, key_lengths=lengths), expected)
    same = torch.tensor([4], dtype=dtype).expand(3)
    assert torch.equal(
        ft.attention_decode(q, k, v, same), ft.attention_decode(q, k, v, same.contiguous())
    )
    cu = torch.tensor([0, 9, 2, 9, 5, 9], dtype=dtype)[::2]
    packed = torch.randn(5, 2, 16)
    ft.attention_varlen(packed, packed, packed, cu, cu, 3, 3)
