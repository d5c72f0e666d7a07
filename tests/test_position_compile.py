"""rotary and embedding_norm under torch.compile, opcheck, FakeTensor and autocast."""

import pytest
import torch
from operators import check_fakes, check_operator, gradients

import fast_transformer as ft


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def turned(query, key, angles):
    """(batch, length, heads, head_dim) as they come from a projection."""
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    query, key = ft.rotary(query, key, angles.cos(), angles.sin())
    alone = ft.rotary(key, None, angles.cos(), angles.sin(), interleaved=True)
    return query * 2 + alone


def embedded(ids, types, *parameters):
    return ft.embedding_norm(
        ids, *parameters, token_type_ids=types, position_ids=ids * 0 + 2, padding_idx=1,
        dropout_p=0.2, seed=torch.tensor(77),
    )  # fmt: skip


TABLES = (9, 8), (5, 8), (2, 8), (8,), (8,)
PROGRAMS = {
    "rotary": (turned, lambda n: (leaf(2, n, 3, 8), leaf(2, n, 1, 8), torch.randn(n, 4))),
    "embedding": (
        embedded,
        lambda n: (
            torch.arange(2 * n).view(2, n) % 9, torch.arange(n) % 2, *(leaf(*s) for s in TABLES),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_compiles_whole_with_dynamic_shapes(backend, program):
    check_compiled(program, "aot_eager")


@pytest.mark.parametrize("program", PROGRAMS)
def test_inductor(cpu, program):
    check_compiled(program, "inductor")


def check_compiled(program, compiler):
    function, make = PROGRAMS[program]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for size in (3, 4, 7):
        inputs = make(size)
        out, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("program", PROGRAMS)
def test_fake_tensors_have_the_strides_of_real_ones(backend, program):
    function, make = PROGRAMS[program]
    check_fakes(function, make(4))


def operator_calls():
    query, key = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 1, 5, 8)
    angles = torch.randn(2, 5, 4)
    cos, sin = angles.cos(), angles.sin()
    yield "rotary", (query, key, cos, sin, False, False)
    yield "rotary", (query.permute(0, 1, 2, 3), None, cos[0], sin[0], True, True)
    yield "rotary", (query.permute(2, 1, 0, 3), None, cos[0, :2], sin[0, :2], True, False)

    ids, seed = torch.tensor([[3, 0, 8], [3, 3, 1]]), torch.tensor(5)
    word, position, types, weight, bias = (torch.randn(*shape) for shape in TABLES)
    rows, statistics = torch.randn(2, 3, 8), torch.rand(2, 6)
    whole = (ids, word, position, types, weight)
    yield "embedding_norm_fwd", (*whole, bias, ids // 2, ids // 5, seed, 1e-5, 0.5)
    yield "embedding_norm_fwd", (ids, word, *(None,) * 7, 1e-5, 0.0)
    for needed in ((True,) * 5, (False, True, False, True, False)):
        given = (*whole, ids // 2, ids // 5, seed, 0.5, 3, 1, *needed)
        yield "embedding_norm_bwd", (rows, statistics, *given)
    given = (ids, word, *(None,) * 6, 0.0, -1, -1, True, False, False, False, False)
    yield "embedding_norm_bwd", (rows, statistics, *given)


@pytest.mark.parametrize(("name", "arguments"), list(operator_calls()))
def test_opcheck(kernels, name, arguments):
    check_operator(name, arguments)


def test_autocast_leaves_them_as_they_are(backend):
    ids, tables = torch.arange(5), [torch.randn(*shape) for shape in TABLES]
    x, angles = torch.randn(1, 2, 5, 8), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.embedding_norm(ids, *tables).dtype == torch.float32
        assert ft.rotary(x, None, angles.cos(), angles.sin()).dtype == torch.float32
        low = ft.rotary(x.bfloat16(), None, angles.cos(), angles.sin())
    assert low.dtype == torch.bfloat16


def test_meta_tensors(kernels):
    x, table = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(5, 4, device="meta")
    assert ft.rotary(x, x, table, table)[1].shape == x.shape
    ids = torch.empty(2, 3, dtype=torch.long, device="meta")
    assert ft.embedding_norm(ids, table).shape == (2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_every_thread_count(cpu, threads, dtype):
    """A row that thousands of tokens chose, and rows that none did."""
    ids = torch.randint(0, 50, (9, 400))
    ids[torch.rand(9, 400) < 0.6] = 7
    word, types = torch.randn(3000, 130).to(dtype), torch.randn(2, 130).to(dtype)
    given = {"token_type_ids": ids % 2, "dropout_p": 0.1, "seed": torch.tensor(3)}

    def run(count):
        threads(count)
        leaves = [x.clone().requires_grad_() for x in (word, types)]
        out = ft.embedding_norm(ids, leaves[0], None, leaves[1], **given)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        return out.detach(), *torch.autograd.grad(out, leaves, weights)

    alone = run(1)
    for count in (1, 2, 5):
        for x, y in zip(run(count), alone, strict=True):
            assert torch.equal(x, y)
