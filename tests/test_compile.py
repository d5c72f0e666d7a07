"""The ops under torch.compile, export, FakeTensor, autocast, checkpointing and copies."""

import copy

import pytest
import torch
from operators import check_fakes, check_operator, gradients
from torch.utils.checkpoint import checkpoint

import fast_transformer as ft
from fast_transformer import testing


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def attention(q, k, v):
    out, lse = ft.attention(q, k, v, causal=True, dropout_p=0.2, seed=SEED, return_lse=True)
    return out * lse[..., None].sigmoid()


def padded(q, k, v):
    lengths = torch.full((q.shape[0],), 3)
    bias = torch.arange(k.shape[2]) > 0
    return ft.attention(q, k, v, key_lengths=lengths, key_starts=lengths - 2, bias=bias)


def varlen(x, cu_seqlens):
    longest = x.shape[0]
    return ft.attention_varlen(x, x, x, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def options(q, k, v, bias):
    slopes = torch.linspace(0, 1, 4)
    return ft.attention(q, k, v, window=(2, 1), alibi_slopes=slopes, softcap=3.0, bias=bias)


def relative(q, k, v, position_key, segment_key, both, distance_bias):
    where = torch.arange(k.shape[2]).expand(k.shape[0], -1)
    return ft.relative_attention(
        q, k, v, position_key=position_key, position_zero=5, content_bias=both, position_bias=both,
        segment_key=segment_key, segment_bias=both, query_segments=where[:, :5] // 2,
        key_segments=where // 2, distance_bias=distance_bias,
    )  # fmt: skip


def merged(q, k, v):
    halves = [ft.attention(q, *kv, return_lse=True) for kv in ((k, v), (k[:, :, 2:], v[:, :, 2:]))]
    return ft.merge_attention(*zip(*halves, strict=True))[0]


def block(x, residual, weight, bias, w1, w2):
    h, total = ft.add_norm(x, residual, weight, bias, dropout_p=0.2, seed=SEED, return_sum=True)
    h = ft.mlp(h, w1, None, w2, bias, activation="gelu_tanh", dropout_p=0.2, seed=SEED)
    h = ft.linear_act(h, w2 @ w1, bias, activation="silu")
    h, total = ft.add_norm(h, total, weight, norm="rms_norm", return_sum=True)
    return ft.layer_norm(ft.rms_norm(h, weight) + total, weight)


SEED = torch.tensor(77)
WEIGHTS = (8,), (8,), (20, 8), (8, 20)
PROGRAMS = {
    "attention": (attention, lambda n: (leaf(n, 2, 5, 8), leaf(n, 2, 6, 8), leaf(n, 2, 6, 8))),
    "padded": (padded, lambda n: (leaf(n, 2, 5, 8), leaf(n, 2, 6, 8), leaf(n, 2, 6, 8))),
    "varlen": (varlen, lambda n: (leaf(2 * n, 2, 8), torch.tensor([0, n, 2 * n]))),
    "options": (
        options,
        lambda n: (leaf(n, 4, 5, 8), leaf(n, 2, 6, 8), leaf(n, 2, 6, 9), leaf(4, 5, 6)),
    ),
    "relative": (
        relative,
        lambda n: (
            *(leaf(n, 2, length, 8) for length in (5, 6, 6)),
            *(leaf(*shape) for shape in ((11, 2, 8), (2, 2, 8), (2, 8), (2, 11))),
        ),
    ),
    "merged": (merged, lambda n: (leaf(n, 2, 5, 8), leaf(n, 2, 6, 8), leaf(n, 2, 6, 8))),
    "block": (block, lambda n: (leaf(2, n, 8), leaf(2, n, 8), *(leaf(*s) for s in WEIGHTS))),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_compiles_whole_with_dynamic_shapes(backend, program):
    """One graph, forward and backward, and no second compilation for a second size."""
    function, make = PROGRAMS[program]
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=aot(count))
    for size in (3, 4, 7):
        inputs = make(size)
        out, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, inputs), gradients(expected, inputs))
    assert len(graphs) == 1


def aot(compiler):
    """AOTAutograd around `compiler`, which sees the forward graph; decompositions left out."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=compiler, bw_compiler=lambda graph, _: graph)


def test_inductor(cpu):
    """The default compiler allocates and reuses around our ops, as the fakes tell it to."""
    function, make = PROGRAMS["attention"]
    inputs = make(3)
    out, expected = torch.compile(function, fullgraph=True)(*inputs), function(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("block_size", [None, 4])
def test_a_cache_grows_in_a_compiled_function(backend, compiler, block_size):
    """In place, one graph for every length."""

    def step(query, caches, lengths, new, table):
        out = ft.attention_decode(
            query, *caches, lengths, new_key=new, new_value=new * 2, block_table=table
        )
        return out + 1, lengths + 1

    def caches():
        shape = (2, 3, 8, 8) if block_size is None else (4, 3, block_size, 8)
        return torch.zeros(shape), torch.zeros(shape)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    table = None if block_size is None else torch.tensor([[3, 0], [2, 1]])
    theirs, ours = caches(), caches()
    lengths = torch.tensor([0, 3])
    for _ in range(3):
        query, new = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 1, 8)
        out, after = compiled(query, ours, lengths, new, table)
        expected, lengths = step(query, theirs, lengths, new, table)
        torch.testing.assert_close((out, after, *ours), (expected, lengths, *theirs))


def test_the_choice_is_made_at_trace_time(kernels):
    function = torch.compile(ft.layer_norm, fullgraph=True, backend="eager")
    x = torch.randn(3, 8)
    with ft.backend("reference"):
        torch.testing.assert_close(function(x), ft.layer_norm(x))

    @torch.compile(fullgraph=True, backend="eager")
    def both(x):
        with ft.backend("reference"):
            y = ft.layer_norm(x)
        return y - ft.layer_norm(x)

    torch.testing.assert_close(both(x), torch.zeros_like(x), atol=1e-6, rtol=0)


def test_fresh_seeds_in_a_compiled_function(backend):
    compiled = torch.compile(ft.add_norm, fullgraph=True, backend="aot_eager")
    x = torch.ones(4, 64)
    first, second = (compiled(x, x, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        made = [torch.nn.Parameter(torch.randn(*shape)) for shape in WEIGHTS]
        self.weight, self.bias, self.w1, self.w2 = made

    def forward(self, x):
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        x = ft.attention(q, q, q, causal=True).transpose(1, 2).flatten(-2)
        return block(x, x, self.weight, self.bias, self.w1, self.w2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export(backend, strict, grad):
    model = Block().requires_grad_(grad)
    length = torch.export.Dim("length", min=2, max=64)
    x = torch.randn(2, 5, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: length},), strict=strict)
    for size in (5, 9):
        x = torch.randn(2, size, 8)
        torch.testing.assert_close(program.module()(x), model(x))
    if backend == "cpu":
        called = {str(node.target) for node in program.graph.nodes}
        assert "fast_transformer.attention_fwd.default" in called


@pytest.mark.parametrize("case", PROGRAMS)
def test_fake_tensors_have_the_strides_of_real_ones(backend, case):
    function, make = PROGRAMS[case]
    check_fakes(function, make(4))


def test_meta_tensors(kernels):
    """No kernel runs there: the reference gives the shape."""
    x = torch.empty(2, 3, 5, 8, device="meta")
    assert ft.attention(x, x, x, dropout_p=0.1, return_lse=True)[1].shape == (2, 3, 5)


def attention_calls():
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 6, 6))
    lengths, seed = torch.tensor([6, 3], dtype=torch.int32), torch.tensor(5)
    bias = torch.randn(4, 1, 6)[None]
    none = (None,) * 7
    options = (bias, lengths - 3, lengths, None, None, seed, *none)
    options += (0.3, True, 1, -1, -1, 0.0, 0, 0.25)
    out, lse = torch.randn(2, 5, 4, 8).transpose(1, 2), torch.randn(2, 4, 5)
    softmax = torch.tensor([3.0, 2.0]).expand(2, 4, 5, 2).contiguous()
    yield "attention_fwd", (q, k, v, *options, True)
    for need_dbias in (False, True):
        yield "attention_bwd", (out, lse, q, k, v, out, softmax, *options, need_dbias)

    shared, narrow = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    options = (None,) * 6 + (torch.rand(1, 4), *none[1:], 0.3, False, None, 2, 3, 1.5, 0, 0.0)
    out = torch.randn(2, 5, 4, 3).transpose(1, 2)
    yield "attention_fwd", (q, shared, narrow, *options, True)
    yield "attention_bwd", (out, lse, q, shared, narrow, out, softmax, *options, False)

    segments = (torch.arange(n, dtype=torch.int32).expand(2, n).contiguous() for n in (5, 6))
    relative = (torch.randn(4, 11), q + 1, torch.randn(1, 4, 11, 8), torch.randn(2, 4, 5, 2))
    options = (None,) * 7 + (*relative, *segments, 0.3, False, None, -1, -1, 0.0, 5, 0.0)
    out = torch.randn(2, 5, 4, 8).transpose(1, 2)
    yield "attention_fwd", (q, k, v, *options, False)
    yield "attention_bwd", (out, None, q, k, v, out, softmax, *options, False)

    packed, cu = torch.randn(1, 3, 6, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    options = (None, None, None, cu, cu, None, *none, 0.3, False, None, -1, -1, 0.0, 0, 0.0)
    out, softmax = torch.randn(1, 6, 3, 8).transpose(1, 2), torch.ones(1, 3, 6, 2)
    yield "attention_fwd", (packed, packed, packed, *options, False)
    yield "attention_bwd", (out, None, packed, packed, packed, out, softmax, *options, False)


def decode_calls():
    query, new = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 1, 8)
    cache, length = torch.randn(2, 2, 6, 8), torch.tensor([5, 3], dtype=torch.int32)
    options = (0.3, True, -1, -1, 0.0)
    yield (
        "attention_decode",
        (query, cache, cache[..., :5].clone(), length, None, None, None, None, *options),
    )
    table, slopes = torch.tensor([[1, 0, 4], [2, 3, -1]], dtype=torch.int32), torch.rand(4)
    pages = torch.randn(5, 2, 2, 8), torch.randn(5, 2, 2, 8)
    options = (0.3, False, 3, 1, 20.0)
    yield "attention_decode", (query, *pages, length, new, new + 1, table, slopes, *options)


def operator_calls():
    yield from attention_calls()
    yield from decode_calls()
    seed = torch.tensor(5)
    x, w, mean = torch.randn(2, 3, 8), torch.randn(8), torch.randn(6)
    for norm, bias, statistic in ((0, w, mean), (1, None, torch.empty(0))):
        yield "norm", (x, None, w, bias, None, norm, 1e-5, 0.0)
        yield "norm", (x, x + 1, None, None, seed, norm, 1e-5, 0.5)
        yield "norm_fwd", (x, None, w, bias, None, norm, 1e-5, 0.0, False)
        yield "norm_fwd", (x, x + 1, None, None, seed, norm, 1e-5, 0.5, True)
        saved, biased = (x + 1, statistic, mean.exp()), norm == 0
        yield "norm_bwd", (x, None, *saved, w, None, norm, 0.0, True, biased)
        yield "norm_bwd", (x, x + 2, *saved, None, seed, norm, 0.5, False, biased)

    x, w1, w2, pre = (
        torch.randn(2, 3, 8),
        torch.randn(7, 8),
        torch.randn(4, 7),
        torch.randn(2, 3, 7),
    )
    b1, b2, dy = torch.randn(7), torch.randn(4), torch.randn(2, 3, 4)
    for activation in (0, 1):
        saved = pre if activation else torch.empty(0)
        yield "linear_act_fwd", (x, w1, b1, activation, True)
        yield "linear_act_fwd", (x, w1, None, activation, False)
        yield "linear_act_bwd", (pre, x, w1, saved, activation, True, True, False)
        yield "linear_act_bwd", (pre, x, w1, saved, activation, False, False, True)
    yield "mlp_fwd", (x, w1, b1, w2, b2, seed, 2, 0.5, True)
    yield "mlp_fwd", (x, w1, None, w2, None, None, 3, 0.0, False)
    yield "mlp_bwd", (dy, x, w1, None, w2, pre, seed, 2, 0.5, True, True, True, True, True)
    yield "mlp_bwd", (dy, x, w1, b1, w2, None, None, 3, 0.0, False, True, False, True, False)


@pytest.mark.parametrize(("name", "arguments"), list(operator_calls()))
def test_opcheck(kernels, name, arguments):
    check_operator(name, arguments)


def test_autocast_lowers_what_multiplies(backend):
    x, w = torch.randn(2, 2, 8, 8), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        attended = ft.attention(x, x, x, bias=torch.zeros(8, 8))
        assert attended.dtype == torch.bfloat16
        packed = ft.attention_varlen(x[0], x[0], x[0], *[torch.tensor([0, 2])] * 2, 2, 2)
        assert packed.dtype == torch.bfloat16
        assert ft.linear_act(x, w).dtype == ft.mlp(x, w, None, w, None).dtype == torch.bfloat16
        for norm in (ft.layer_norm, ft.rms_norm):
            assert norm(x).dtype == torch.float32
            assert norm(attended, w[0]).dtype == torch.bfloat16
        assert ft.add_norm(attended, x).dtype == ft.add_norm(x, attended).dtype == torch.float32
        out, total = ft.add_norm(attended, attended, w[0], return_sum=True)
        assert out.dtype == total.dtype == torch.bfloat16
        if backend == "reference":
            assert ft.attention(x.double(), x.double(), x.double()).dtype == torch.float64
    low = x.bfloat16()
    assert torch.equal(attended, ft.attention(low, low, low, bias=torch.zeros(8, 8)))


def test_autocast_gives_gradients_in_the_parameters_dtype(backend):
    x, w = leaf(4, 8), leaf(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ft.linear_act(ft.add_norm(x, x, w[0]), w, activation="gelu").sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


def test_autocast_under_compile(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, w):
        return ft.linear_act(x, w, activation="gelu")

    x, w = torch.randn(4, 8), leaf(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(x, w)
        torch.testing.assert_close(out, ft.linear_act(x, w, activation="gelu"))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and w.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, use_reentrant):
    """The second forward pass draws the mask of the first."""

    def function(x):
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        out = ft.attention(q, q, q, dropout_p=0.3).transpose(1, 2).flatten(-2)
        return ft.add_norm(out, x, dropout_p=0.3)

    x = leaf(2, 5, 8)
    torch.manual_seed(3)
    expected = gradients(function(x), [x])
    torch.manual_seed(3)
    out = checkpoint(function, x, use_reentrant=use_reentrant)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    out.backward(weights)
    assert torch.equal(x.grad, expected[0])


def test_inference_mode_and_copies(backend):
    model = Block()
    x = torch.randn(2, 5, 8)
    expected = model(x).detach()
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(x), expected)
    with torch.no_grad():
        out = ft.layer_norm(leaf(3, 8))
    assert not out.requires_grad and out.grad_fn is None


def test_cases_are_fresh_and_equal():
    """Nothing that a case hands out is shared, and every call gives the same numbers."""
    case = testing.CASES[0]
    first, second = case.inputs(torch.float32), case.inputs(torch.float32)
    assert torch.equal(first["query"], second["query"])
    assert first["query"].data_ptr() != second["query"].data_ptr()
