"""Which positions a mask leaves out as padding, in every form that transformers hands down."""

import pytest
import torch
from small_models import MASKS, B, T, ids, pair, real

from fast_transformer.integrations.masks import padding

LOWEST = torch.finfo(torch.float32).min


def forms(keep):
    """The forms that one (batch, length) mask comes in."""
    four = keep[:, None, None, :]
    return {
        "2-D bool": keep,
        "2-D int": keep.long(),
        "4-D thin": four,
        "4-D expanded": four.expand(B, 1, T, T),
        "4-D whole": four.expand(B, 1, T, T).contiguous(),
        "every head": four.expand(B, 4, T, T).contiguous(),
        "additive": torch.zeros(B, 1, T, T).masked_fill(~four, LOWEST),
        "additive, infinite": torch.zeros(B, 1, 1, T).masked_fill(~four, -torch.inf),
        "additive, bf16": torch.zeros(B, 1, T, T).masked_fill(~four, LOWEST).bfloat16(),
    }


@pytest.mark.parametrize("mask", ["full", "right", "left", "holes", "empty sample"])
@pytest.mark.parametrize("form", forms(torch.ones(B, T, dtype=torch.bool)))
def test_padding_is_found_in_every_form(form, mask):
    keep = real(MASKS[mask]())
    assert torch.equal(padding(forms(keep)[form], B, T), keep)


def test_one_mask_for_the_whole_batch():
    keep = torch.arange(T) < 5
    assert torch.equal(padding(keep.view(1, 1, 1, T), B, T), keep.expand(B, T))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T),
        torch.zeros(1, 1, T, T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), LOWEST),
        torch.full((B, 1, 1, T), -1.0),
        torch.full((B, 1, 1, T), 1.0),
        torch.ones(B, T, T, dtype=torch.bool),
        torch.ones(B, 1, T, T + 1, dtype=torch.bool),
    ],
    ids=["causal", "causal, additive", "weighing", "ones", "3-D", "more keys"],
)
def test_another_kind_of_mask_is_no_padding(mask):
    assert padding(mask, B, T) is None


def test_one_row_that_differs_is_enough():
    mask = real(MASKS["right"]())[:, None, None, :].expand(B, 1, T, T).clone()
    mask[2, 0, 7, 9] = True
    assert padding(mask, B, T) is None


def test_heads_that_differ_are_no_padding():
    mask = torch.ones(B, 4, T, T, dtype=torch.bool)
    mask[:, 2, :, 5:] = False
    assert padding(mask, B, T) is None


@pytest.mark.parametrize("mask", ["right", "left", "holes", "empty sample"])
@pytest.mark.parametrize("form", ["2-D int", "2-D bool", "4-D thin", "additive, infinite"])
def test_an_encoder_takes_every_form(backend, form, mask):
    """As with flash_attention_2, which hands down the 2-D mask."""
    stock, fast = pair()
    keep, x = real(MASKS[mask]()), torch.randn(B, T, 32)
    bias = keep[:, None, None, :].expand(B, 1, T, T)
    with torch.no_grad():
        expected = stock.encoder(x, bias).last_hidden_state
        found = fast.encoder(x, forms(keep)[form]).last_hidden_state
        layer = fast.encoder.layer[0](x, forms(keep)[form])
        torch.testing.assert_close(
            layer[keep], stock.encoder.layer[0](x, bias)[keep], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert not found[~keep].any()


def test_padding_never_reaches_a_token(backend):
    """Not even as NaN."""
    _, fast = pair()
    x, mask = torch.randn(B, T, 32), MASKS["holes"]()
    keep = real(mask)
    with torch.no_grad():
        expected = fast.encoder(x, mask).last_hidden_state
        found = fast.encoder(x.masked_fill(~keep[..., None], torch.nan), mask).last_hidden_state
    assert torch.equal(found, expected)


def test_a_sample_is_what_it_is_alone(cpu):
    """To rounding, whatever stands beside it in the batch."""
    _, fast = pair()
    tokens, mask = ids(), MASKS["right"]()
    with torch.no_grad():
        together = fast(tokens, mask).last_hidden_state
        for b, length in enumerate(mask.sum(1).tolist()):
            alone = fast(tokens[b : b + 1, :length]).last_hidden_state
            torch.testing.assert_close(together[b, :length], alone[0], atol=2e-6, rtol=1e-5)
