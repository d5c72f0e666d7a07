"""The mask of attention's dropout, bit for bit, and its place in a padded or packed batch."""

import pytest
import torch

import fast_transformer as ft
from fast_transformer import testing
from fast_transformer.reference.philox import keep_mask, keep_scale

SEED = torch.tensor(2**50 + 2**33 + 5)


def kept(B, H, T, S, dtype, dropout_p, **options):
    """Read the mask off the op: equal scores, and a value that is a unit matrix, a window a time.

    Row i of the output is then keep[i, j] · scale / (keys that row i sees), in column j.
    """
    width, found = 64, []
    query, key = torch.zeros(B, H, T, width, dtype=dtype), torch.zeros(B, H, S, width, dtype=dtype)
    for start in range(0, S, width):
        value = torch.zeros(S, width, dtype=dtype)
        size = min(width, S - start)
        value[start : start + size, :size] = torch.eye(size)
        value = value.expand(B, H, S, width)
        out = ft.attention(query, key, value, dropout_p=dropout_p, seed=SEED, **options)
        found.append(out[..., :size])
    return torch.cat(found, -1)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [1e-5, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 70), (1, 2, 70, 9), (1, 1, 200, 600)])
def test_mask_is_philox(backend, shape, dropout_p, dtype):
    out = kept(*shape, dtype, dropout_p)
    keep = keep_mask(SEED, dropout_p, *shape)
    assert torch.equal(out != 0, keep)
    expected = keep * keep_scale(dropout_p) / shape[-1]
    torch.testing.assert_close(out, expected.to(dtype), atol=0, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mask", ["causal", "lengths", "starts", "bias", "window"])
def test_masks_do_not_move_it(backend, mask):
    B, H, T, S = 2, 2, 70, 130
    column = torch.arange(S)
    allowed = torch.rand(T, S) < 0.5
    options, seen = {
        "causal": ({"causal": True}, column <= torch.arange(T)[:, None] + S - T),
        "lengths": ({"key_lengths": torch.tensor([100, 130])}, None),
        "starts": ({"key_starts": torch.tensor([65, 3])}, None),
        "bias": ({"bias": allowed}, allowed),
        "window": ({"window": (20, 70)}, None),
    }[mask]
    if mask == "window":
        ahead = column - torch.arange(T)[:, None] - (S - T)
        seen = (ahead >= -20) & (ahead <= 70)
    if mask == "lengths":
        seen = (column < options["key_lengths"][:, None])[:, None, None]
    if mask == "starts":
        seen = (column >= options["key_starts"][:, None])[:, None, None]
    out = kept(B, H, T, S, torch.float32, 0.3, **options)
    assert torch.equal(out != 0, keep_mask(SEED, 0.3, B, H, T, S) & seen)


def test_packed_and_padded_masks_agree(backend):
    lengths = [70, 3, 0, 130]
    x = torch.randn(sum(lengths), 2, 16)
    cu = testing.offsets(lengths)
    packed = ft.attention_varlen(x, x, x, cu, cu, 130, 130, dropout_p=0.5, seed=SEED)
    padded = torch.zeros(4, 130, 2, 16)
    inside = torch.arange(130) < torch.tensor(lengths)[:, None]
    padded[inside] = x
    padded = padded.transpose(1, 2)
    out = ft.attention(
        padded, padded, padded, key_lengths=torch.tensor(lengths), dropout_p=0.5, seed=SEED
    )
    torch.testing.assert_close(out.transpose(1, 2)[inside], packed)


def test_a_fresh_seed_each_call_from_torchs_generator(backend):
    q = torch.randn(1, 1, 8, 8)
    torch.manual_seed(3)
    first, second = (ft.attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    again = ft.attention(q, q, q, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    before = torch.get_rng_state()
    ft.attention(q, q, q, dropout_p=0.5, seed=SEED)
    ft.attention(q, q, q)
    assert torch.equal(torch.get_rng_state(), before)
