"""attention_decode: the definition against attention's, the kernel against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast_transformer as ft
from fast_transformer import backends, testing

NAN = float("nan")


def arguments(B=2, H=4, KV=2, T=1, S=70, D=16, Dv=None, dtype=torch.float32, lengths=None):
    made = {"query": torch.randn(B, H, T, D).to(dtype)}
    made["key_cache"] = torch.randn(B, KV, S, D).to(dtype)
    made["value_cache"] = torch.randn(B, KV, S, Dv or D).to(dtype)
    made["cache_lengths"] = torch.tensor(lengths or [S - 3 * b for b in range(B)])
    return made


def appended(inputs, n=1):
    B, KV, _, D = inputs["key_cache"].shape
    dtype, Dv = inputs["query"].dtype, inputs["value_cache"].shape[3]
    new = {"new_key": torch.randn(B, KV, n, D).to(dtype)}
    return inputs | new | {"new_value": torch.randn(B, KV, n, Dv).to(dtype)}


def paged(inputs, block_size, spare=2):
    """The same cache in shuffled blocks, which more blocks lie between; tables end in rubbish."""
    B, KV, S, _ = inputs["key_cache"].shape
    count = -(-S // block_size)
    order = torch.randperm(B * count + spare)
    table = torch.full((B, count + 1), -7)
    table[:, :count] = order[: B * count].view(B, count)
    made = dict(inputs, block_table=table)
    for name in ("key_cache", "value_cache"):
        cache = inputs[name]
        pages = torch.full((len(order), KV, block_size, cache.shape[3]), NAN).to(cache.dtype)
        for b in range(B):
            for i in range(count):
                rows = cache[b, :, i * block_size : (i + 1) * block_size]
                pages[table[b, i], :, : rows.shape[1]] = rows
        made[name] = pages
    return made


def copied(inputs):
    return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_reference_is_attentions(causal, n):
    inputs = arguments(T=3, S=11, D=8, Dv=8, dtype=torch.float64, lengths=[7, 4])
    inputs = appended(inputs, n) if n else inputs
    with ft.backend("reference"):
        out, lse = ft.attention_decode(**inputs, causal=causal, return_lse=True)
        for b, length in enumerate((7 + n, 4 + n)):
            k, v = (
                inputs[f"{x}_cache"][b : b + 1, :, :length].repeat_interleave(2, 1)
                for x in ("key", "value")
            )
            expected = ft.attention(
                inputs["query"][b : b + 1], k, v, causal=causal, return_lse=True
            )
            torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), expected)


def test_reference_options_are_the_formula():
    inputs = arguments(B=1, H=2, KV=1, T=2, S=9, D=8, dtype=torch.float64, lengths=[9])
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    with ft.backend("reference"):
        out = ft.attention_decode(**inputs, window=(3, -1), alibi_slopes=slopes, softcap=2.0)
    q, k, v = (inputs[x] for x in ("query", "key_cache", "value_cache"))
    for h in range(2):
        for i in range(2):
            position = i + 7
            seen = range(position - 3, position + 1)
            raw = torch.stack([q[0, h, i] @ k[0, 0, j] * 8**-0.5 for j in seen])
            distance = torch.tensor([abs(position - j) for j in seen])
            probs = (2 * (raw / 2).tanh() - slopes[h] * distance).softmax(0)
            expected = sum(p * v[0, 0, j] for p, j in zip(probs, seen, strict=True))
            torch.testing.assert_close(out[0, h, i], expected)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases("decode", "test"), ids=lambda case: case.name)
def test_cases(cpu, case, dtype):
    testing.check(case.op, case.inputs(dtype))


@pytest.mark.parametrize("scale", [0.0, 0.02, -1.0, 3.0])
def test_scale(cpu, scale):
    testing.check("attention_decode", arguments() | {"scale": scale, "return_lse": True})


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [1e-3, 1.0, 50.0, 1e4])
def test_softcap(cpu, softcap, dtype):
    inputs = arguments(T=2, S=600, D=64, dtype=dtype)
    testing.check("attention_decode", inputs | {"softcap": softcap, "return_lse": True})


@pytest.mark.parametrize("window", [(0, 0), (0, -1), (-1, 0), (15, 3), (511, 2), (600, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 5])
def test_window(cpu, window, causal, T):
    inputs = appended(arguments(T=T, S=1200, lengths=[1190, 520]), 2)
    options = {"window": window, "causal": causal, "return_lse": True}
    testing.check("attention_decode", inputs | options)


def test_slopes_of_each_sequence(cpu):
    inputs, slopes = arguments(T=2), torch.rand(2, 4)
    together = ft.attention_decode(**inputs, alibi_slopes=slopes)
    for b in range(2):
        alone = {name: x[b : b + 1] for name, x in inputs.items()}
        assert torch.equal(
            ft.attention_decode(**alone, alibi_slopes=slopes[b]), together[b : b + 1]
        )


LAYOUTS = {
    "batch-length-heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "length-first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "every-second-row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "offset": lambda x: torch.cat([x[..., :1], x], 3)[..., 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_strides_change_nothing(cpu, layout, dtype):
    inputs = appended(arguments(T=3, S=600, D=40, dtype=dtype, lengths=[597, 90]), 2)
    laid = {n: LAYOUTS[layout](x) if x.dim() == 4 else x for n, x in inputs.items()}
    assert torch.equal(ft.attention_decode(**laid), ft.attention_decode(**inputs))
    for name in ("key_cache", "value_cache"):
        assert torch.equal(laid[name], inputs[name])


def test_strided_head_dim(backend):
    """A query is copied; a cache cannot be, so the reference takes it."""
    inputs = arguments()
    expected = ft.attention_decode(**inputs)
    inputs["query"] = inputs["query"].repeat_interleave(2, dim=3)[..., ::2]
    torch.testing.assert_close(ft.attention_decode(**inputs), expected)
    inputs["key_cache"] = inputs["key_cache"].repeat_interleave(2, dim=3)[..., ::2]
    if backend == "cpu":
        reason = "a key_cache whose last dimension is not contiguous"
        with pytest.raises(RuntimeError, match=reason):
            ft.attention_decode(**inputs)
    else:
        torch.testing.assert_close(ft.attention_decode(**inputs), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 7, 16, 64, 700])
def test_paged_is_contiguous(cpu, dtype, block_size):
    """Bit for bit, whatever the blocks and their order; and the same rows are written."""
    inputs = appended(arguments(T=3, S=700, D=40, Dv=24, dtype=dtype, lengths=[690, 260]), 9)
    pages = paged(inputs, block_size)
    expected = ft.attention_decode(**inputs, return_lse=True)
    got = ft.attention_decode(**pages, return_lse=True)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    for name in ("key_cache", "value_cache"):
        for b, length in enumerate((699, 269)):
            rows = pages[name][pages["block_table"][b, :-1]].transpose(0, 1).flatten(1, 2)
            assert torch.equal(rows[:, :length], inputs[name][b, :, :length])


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("T", [0, 1, 4])
@pytest.mark.parametrize("block_size", [None, 4])
def test_new_keys_are_put_in_place(backend, dtype, T, block_size):
    """Exactly where they belong, bit for bit, and nothing else changes."""
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    inputs = appended(arguments(T=T, S=520, D=5, Dv=3, dtype=dtype, lengths=[510, 0]), 6)
    if block_size:
        inputs = paged(inputs, block_size)
    before = copied(inputs)
    ft.attention_decode(**inputs, window=(2, -1))
    for side in ("key", "value"):
        expected = before[f"{side}_cache"]
        for b, length in enumerate((510, 0)):
            for i in range(6):
                at = (b, length + i)
                if block_size:
                    block, row = divmod(length + i, block_size)
                    at = (before["block_table"][b, block], row)
                expected[at[0], :, at[1]] = before[f"new_{side}"][b, :, i]
        assert torch.equal(inputs[f"{side}_cache"].nan_to_num(9), expected.nan_to_num(9))
    for name in ("query", "cache_lengths", "new_key", "new_value"):
        assert torch.equal(inputs[name], before[name])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_one_token_after_another_is_all_at_once(cpu, dtype):
    """A cache that grows token by token attends as ft.attention does on the whole."""
    q, k, v = (torch.randn(2, 4, 37, 16).to(dtype) for _ in range(3))
    caches = [torch.full((2, 4, 40, 16), NAN).to(dtype) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int32)
    rows = []
    for i in range(37):
        one = slice(i, i + 1)
        rows.append(
            ft.attention_decode(
                q[:, :, one], *caches, lengths, new_key=k[:, :, one], new_value=v[:, :, one]
            )
        )
        lengths += 1
    with ft.backend("reference"):
        expected = ft.attention(q.double(), k.double(), v.double(), causal=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat(rows, 2).double(), expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[0, 17], [64, 511], [512, 5], [1, 1030]], ids=str)
def test_the_rest_of_the_cache_is_never_read(cpu, dtype, lengths):
    """NaN there, around the caches and in blocks of no one, changes no bit."""
    inputs = arguments(T=2, S=1100, D=40, Dv=24, dtype=dtype, lengths=lengths)
    expected = ft.attention_decode(**inputs, return_lse=True)
    beyond = (torch.arange(1100) >= inputs["cache_lengths"][:, None])[:, None, :, None]
    poisoned = dict(inputs)
    for name in ("query", "key_cache", "value_cache"):
        x = inputs[name] if name == "query" else inputs[name].masked_fill(beyond, NAN)
        around = torch.full([n + 2 for n in x.shape], NAN).to(dtype)
        poisoned[name] = around[1:-1, 1:-1, 1:-1, 1:-1].copy_(x)
    got = ft.attention_decode(**poisoned, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (16, 1)], ids=str)
def test_a_batch_is_its_items(cpu, threads, dtype, heads):
    """Bit for bit, on any number of threads, from a cache of any room, for each head alone."""
    H, KV = heads
    inputs = arguments(3, H, KV, 2, 1100, 40, dtype=dtype, lengths=[1100, 513, 20])
    threads(1)
    together = ft.attention_decode(**inputs)
    for count in (2, 5):
        threads(count)
        assert torch.equal(ft.attention_decode(**inputs), together)
    for b, length in enumerate((1100, 513, 20)):
        for h in range(KV):
            rows = slice(h * H // KV, (h + 1) * H // KV)
            alone = ft.attention_decode(
                inputs["query"][b : b + 1, rows],
                inputs["key_cache"][b : b + 1, h : h + 1, :length].clone(),
                inputs["value_cache"][b : b + 1, h : h + 1, :length].clone(),
                torch.tensor([length]),
            )
            assert torch.equal(alone, together[b : b + 1, rows])


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
def test_rows_without_a_key(backend, dtype):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    inputs = arguments(T=5, S=8, dtype=dtype, lengths=[0, 2])
    out, lse = ft.attention_decode(**inputs, return_lse=True)
    for b, empty in enumerate((5, 3)):
        assert (out[b, :, :empty] == 0).all() and (lse[b, :, :empty] == -torch.inf).all()
    assert bool(out.isfinite().all()) and bool(lse[1, :, 3:].isfinite().all())


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(backend, shape):
    B, H, T, S = shape
    inputs = arguments(B, H, 2, T, S, 8, lengths=[0] * B)
    inputs["cache_lengths"] = inputs["cache_lengths"].long()
    out, lse = ft.attention_decode(**inputs, return_lse=True)
    assert out.shape == (B, H, T, 8) and lse.shape == (B, H, T)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_infinite_values_stay_infinite(cpu):
    for dtype in testing.DTYPES:
        inputs = arguments(B=1, H=1, KV=1, S=33, D=24, dtype=dtype)
        inputs["value_cache"][0, 0, 32, 3] = torch.inf
        out = ft.attention_decode(**inputs)
        assert (out[..., 3] == torch.inf).all()
        assert out[..., 4:].isfinite().all() and out[..., :3].isfinite().all()


def test_memory_layout(backend):
    out, lse = ft.attention_decode(**arguments(T=3), return_lse=True)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    assert not out.requires_grad


def test_float64_is_the_references(kernels):
    inputs = appended(arguments(S=20, dtype=torch.float64, lengths=[9, 4]), 1)
    with backends.record() as calls:
        ft.attention_decode(**inputs)
    assert calls == [backends.Call("attention_decode", "reference", {"cpu": "dtype float64"})]


def test_versions_count_what_is_written(backend):
    """So that autograd sees when a cache it has saved was changed."""
    inputs = arguments(S=20, lengths=[9, 4])
    ft.attention_decode(**inputs)
    assert inputs["key_cache"]._version == inputs["value_cache"]._version == 0
    ft.attention_decode(**appended(inputs))
    assert inputs["key_cache"]._version > 0 and inputs["value_cache"]._version > 0
    with torch.inference_mode():
        ft.attention_decode(**appended(arguments(S=20, lengths=[9, 4])))


def test_autocast_follows_the_cache(backend):
    inputs = appended(arguments(dtype=torch.bfloat16, lengths=[9, 4]), 1)
    expected = ft.attention_decode(**inputs)
    wide = {n: x.float() if n in ("query", "new_key", "new_value") else x
            for n, x in inputs.items()}  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ft.attention_decode(**wide), expected)


@given(data=st.data())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_any_shape_and_mask(kernels, dtype, data):
    integers = st.integers
    B, KV, group = (data.draw(integers(1, 3)) for _ in range(3))
    T, S, n = data.draw(integers(1, 9)), data.draw(integers(1, 1300)), data.draw(integers(0, 3))
    D, Dv = (data.draw(st.sampled_from([1, 3, 8, 31, 40, 64, 72])) for _ in range(2))
    n = min(n, S)
    torch.manual_seed(data.draw(integers(0, 2**31)))
    lengths = data.draw(st.lists(integers(0, S - n), min_size=B, max_size=B))
    inputs = arguments(B, KV * group, KV, T, S, D, Dv, dtype, lengths)
    inputs = appended(inputs, n) if n else inputs
    if data.draw(st.booleans()):
        inputs = paged(inputs, data.draw(st.sampled_from([1, 5, 16, 100])))
    inputs |= {"causal": data.draw(st.booleans()), "return_lse": True}
    sides = st.sampled_from([-1, 0, 3, 30, 700])
    inputs["window"] = (data.draw(sides), data.draw(sides))
    inputs["softcap"] = data.draw(st.sampled_from([0.0, 2.0, 30.0]))
    if data.draw(st.booleans()):
        inputs["alibi_slopes"] = torch.rand(KV * group)
    testing.check("attention_decode", inputs)
