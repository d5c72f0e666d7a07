"""GPT-2's generate(), accelerated: the tokens of the stock model with every cache, in place."""

import copy

import pytest
import torch
from small_gpt2 import LAYERS, build, counted, pair

import fast_transformer as ft

NEW = 20


def prompts(batch=3, length=9):
    return torch.randint(3, 60, (batch, length))


def padded(tokens, side):
    """Some tokens fewer in every row but the first; what stands there instead may be anything."""
    mask = torch.ones_like(tokens)
    for row in range(1, len(tokens)):
        mask[row, : 2 * row] = 0
    return mask if side == "left" else mask.flip(1)


def tokens_of(model, tokens, mask=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(tokens, attention_mask=mask, eos_token_id=None, **options)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False},
     {"num_beams": 2, "cache_implementation": "static"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_the_stock_models_tokens(backend, impl, options):
    stock, fast = pair(impl=impl)
    tokens = prompts()
    expected = tokens_of(stock, tokens, **options)
    found, ops, backends = counted(tokens_of, fast, tokens, **options)
    assert torch.equal(found, expected) and backends == {backend}
    if options.get("use_cache", True):
        assert ops["attention_decode"] == (NEW - 1) * LAYERS and ops["attention"] == LAYERS
    assert ops["mlp"] == NEW * LAYERS and ops["linear_act"] == NEW * (2 * LAYERS + 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_prompts(backend, cache, side):
    stock, fast = pair()
    tokens = prompts()
    mask = padded(tokens, side)
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    expected = tokens_of(stock, tokens, mask, **options)
    found, ops, backends = counted(tokens_of, fast, tokens, mask, **options)
    assert torch.equal(found, expected) and backends == {backend}
    assert ops["mlp"] == NEW * LAYERS


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"do_sample": True, "top_k": 5}, {"prefill_chunk_size": 4}],
    ids=str,
)
def test_other_ways_to_generate(cpu, options):
    stock, fast = pair()
    tokens, found = prompts(1), []
    for model in (stock, fast):
        torch.manual_seed(7)
        found.append(tokens_of(model, tokens, **options))
    assert torch.equal(*found)


def logits(model, tokens, pieces, cache=None, grad=False):
    """Of all tokens, given piece by piece; and the cache."""
    parts = []
    with torch.set_grad_enabled(grad):
        for piece in tokens.split(pieces, dim=1):
            out = model(piece, cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [3, 9]], ids=str)
def test_pieces_give_what_the_whole_gives(backend, pieces, grad):
    stock, fast = pair()
    tokens = prompts(2, 12)
    whole = fast(tokens, use_cache=False).logits
    found, cache = logits(fast, tokens, pieces, grad=grad)
    expected, other = logits(stock, tokens, pieces)
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert cache.get_seq_length() == 12
    for own, theirs in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(own.keys, theirs.keys, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(own.values, theirs.values, atol=2e-5, rtol=1e-5)


def test_a_cache_is_its_own(cpu):
    """Copies of a cache, deep or shallow, and tensors taken from it do not see later tokens."""
    _, fast = pair()
    tokens = prompts(2, 12)
    _, cache = logits(fast, tokens[:, :6], [6])
    deep, kept = copy.deepcopy(cache), [layer.keys for layer in cache.layers]
    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    values = [k.clone() for k in kept]
    first, _ = logits(fast, tokens[:, 6:9], [1] * 3, cache)
    for other in (shallow, deep):
        # another continuation, then the first once more
        found, _ = logits(fast, tokens[:, 8:11], [1] * 3, copy.deepcopy(other))
        logits(fast, tokens[:, 9:12], [1] * 3, other)
        assert other.get_seq_length() == 9 and not torch.allclose(found, first)
    again, _ = logits(fast, tokens[:, 9:12], [1] * 3, cache)
    whole = fast(tokens, use_cache=False).logits
    torch.testing.assert_close(again, whole[:, 9:12], atol=2e-5, rtol=1e-5)
    assert all(torch.equal(k, v) for k, v in zip(kept, values, strict=True))


def test_new_keys_are_written_in_place(cpu):
    _, fast = pair()
    tokens = prompts(2, 12)
    _, cache = logits(fast, tokens[:, :6], [6])
    places = [layer.keys.data_ptr() for layer in cache.layers]
    logits(fast, tokens[:, 6:], [1] * 6, cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places


def test_a_cache_grows_beyond_its_room(cpu):
    stock, fast = pair(n_positions=400)
    tokens = prompts(1, 300)
    expected, _ = logits(stock, tokens, [2] + [1] * 298)
    found, cache = logits(fast, tokens, [2] + [1] * 298)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    assert cache.get_seq_length() == 300


def test_cropped_reset_and_reordered(cpu):
    stock, fast = pair()
    tokens = prompts(2, 12)
    results = []
    for model in (stock, fast):
        _, cache = logits(model, tokens[:, :8], [7, 1])
        cache.crop(-3)
        a, _ = logits(model, tokens[:, 5:7], [1, 1], cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        b, _ = logits(model, tokens[:, 7:9].flip(0), [1, 1], cache)
        cache.reset()
        c, _ = logits(model, tokens, [11, 1], cache)
        results.append((a, b, c))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_inference_mode_and_out_of_it(cpu):
    _, fast = pair()
    tokens = prompts(2, 12)
    whole = fast(tokens, use_cache=False).logits
    with torch.inference_mode():
        _, cache = logits(fast, tokens[:, :6], [5, 1])
    found, _ = logits(fast, tokens[:, 6:], [1] * 6, cache)
    torch.testing.assert_close(found, whole[:, 6:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_a_cache_or_block_of_another_kind(cpu, kind):
    """Takes the stock way, step by step, with the same tokens."""
    from transformers import DynamicCache

    class Own(DynamicCache):
        pass

    stock, fast = pair()
    tokens, options = prompts(), {}
    expected = tokens_of(stock, tokens)
    if kind == "hook":
        fast.transformer.h[0].register_forward_hook(lambda *args: None)
    else:
        options["cache"] = Own(config=fast.config)
    found, ops, _ = counted(tokens_of, fast, tokens, **options)
    assert torch.equal(found, expected) and ops["mlp"] == NEW * LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_other_dtypes(kernels, dtype):
    fast = ft.accelerate(build(dtype=dtype))
    tokens = prompts()
    assert tokens_of(fast, tokens).shape == (3, 9 + NEW)
