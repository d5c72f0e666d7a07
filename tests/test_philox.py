"""The generator against published vectors, and the masks against the layout that ops share."""

import itertools

import pytest
import torch

from fast_transformer.reference import philox

# Random123's kat_vectors, "philox4x32 10": counter, key, output
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    words = philox.philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in words) == output


def test_masks_follow_the_layout():
    """keep[b, h, i, j] is the draw j % 8 of the call (j // 8, i, h, b), low half first."""
    seed, dropout_p = 0x0123456789ABCDEF, 0.4
    mask = philox.keep_mask(torch.tensor(seed), dropout_p, 2, 3, 4, 21)
    assert mask.shape == (2, 3, 4, 21)
    for b, h, i, j in itertools.product(range(2), range(3), range(4), range(21)):
        words = philox.philox4x32((j // 8, i, h, b), (seed & 0xFFFFFFFF, seed >> 32))
        draw = words[j % 8 // 2] >> (16 * (j % 2)) & 0xFFFF
        assert mask[b, h, i, j] == (draw >= round(65536 * dropout_p))


def test_masks_depend_on_position_alone():
    seed = torch.tensor(11)
    large = philox.keep_mask(seed, 0.3, 3, 2, 9, 100)
    assert torch.equal(philox.keep_mask(seed, 0.3, 2, 1, 5, 37), large[:2, :1, :5, :37])
    assert not torch.equal(philox.keep_mask(seed + 1, 0.3, 3, 2, 9, 100), large)
    assert not torch.equal(philox.keep_mask(seed + 2**40, 0.3, 3, 2, 9, 100), large)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_rate(dropout_p):
    mask = philox.keep_mask(torch.tensor(5), dropout_p, 1, 1, 1000, 1000)
    assert abs(mask.double().mean().item() - (1 - dropout_p)) < 5e-3  # about 10 standard errors
    assert philox.keep_scale(dropout_p) == pytest.approx(1 / (1 - dropout_p), rel=1e-4)


def test_ends_of_the_range():
    seed = torch.tensor(5)
    assert philox.keep_mask(seed, 0.0, 1, 1, 64, 64).all()
    assert not philox.keep_mask(seed, 1.0, 1, 1, 64, 64).any()
    assert philox.keep_scale(1.0) == 0.0
    assert philox.keep_scale(0.0) == 1.0


def test_dropout_numbers_rows_in_order():
    x, seed = torch.randn(3, 5, 20), torch.tensor(8)
    flat = philox.dropout(x.view(15, 20), 0.25, seed)
    assert torch.equal(philox.dropout(x, 0.25, seed).view(15, 20), flat)
    assert torch.equal(flat != 0, philox.keep_mask(seed, 0.25, 1, 1, 15, 20)[0, 0])
