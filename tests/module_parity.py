"""A module of ours beside its torch.nn namesake: same parameters, same inputs, same cotangents."""

import copy

import torch

import fast_transformer as ft
from fast_transformer.accuracy import assert_close_to_reference

DRAWS = 5

B, T, C = 3, 11, 18
LAYER = {
    "d_model": C, "nhead": 3, "dim_feedforward": 21, "dropout": 0.0, "batch_first": True
}  # fmt: skip


def randomized(module):
    """Give every parameter a value that matters: torch.nn's biases start at zero, weights at 1."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.3 + ("norm" in name))
    return module


def twins(name, *args, **options):
    """The stock module and ours, with the same random parameters, float32, dropout as given."""
    stock = randomized(getattr(torch.nn, name)(*args, **options))
    ours = getattr(ft.nn, name)(*args, **options)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def encoders(layer, layers=2, final_norm=False):
    """A stock encoder of `layers` different layers like `layer`, and ours like it."""
    made = []
    for source in (torch.nn, ft.nn):
        norm = source.LayerNorm(layer["d_model"]) if final_norm else None
        made.append(
            source.TransformerEncoder(
                source.TransformerEncoderLayer(**layer), layers, norm, enable_nested_tensor=False
            )
        )
    stock, ours = made
    ours.load_state_dict(randomized(stock).state_dict(), strict=True)
    return stock, ours


def cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def evaluate(module, leaves, positional, options, dtype, keep=None):
    """Outputs "0", "1" and the gradients of every leaf and parameter; where not `keep`, zeros."""
    leaves = {name: cast(x.detach(), dtype).requires_grad_() for name, x in leaves.items()}
    options = {name: cast(x, dtype) for name, x in options.items()}
    outputs = module(*(leaves[name] for name in positional), **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [x for x in outputs if x is not None]
    if keep is not None:
        outputs = [x.masked_fill(~keep[..., None], 0) for x in outputs]
    random = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(x.shape, generator=random).to(x.dtype) for x in outputs]
    inputs = leaves | dict(module.named_parameters())
    grads = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    results = {str(i): x.detach() for i, x in enumerate(outputs)}
    return results | {f"d{name}": g for name, g in zip(inputs, grads, strict=True)}


def check(stock, ours, leaves, positional, dtype, options=None, keep=None):
    """Hold ours to stock: in float64 to rounding, else to twice stock's own error against float64.

    Stock's error is one draw of its rounding; where that is exceeded, inputs that differ in their
    last bits give more, as fast_transformer.accuracy does.
    """
    options = options or {}
    stock, ours = (copy.deepcopy(m).to(dtype) for m in (stock, ours))
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    options = {name: cast(x, dtype) for name, x in options.items()}
    got = evaluate(ours, leaves, positional, options, dtype, keep)
    same = evaluate(stock, leaves, positional, options, dtype, keep)
    if dtype == torch.float64:
        torch.testing.assert_close(got, same, rtol=1e-9, atol=1e-9)
        return
    exact_stock = copy.deepcopy(stock).double()

    def exact(leaves):
        return evaluate(exact_stock, leaves, positional, options, torch.float64, keep)

    try:
        assert_close_to_reference(got, same, exact(leaves))
    except AssertionError:
        draws = []
        for draw in range(DRAWS):
            random = torch.Generator().manual_seed(draw)
            eps = torch.finfo(dtype).eps
            near = {
                name: x * (1 + eps * torch.randint(-1, 2, x.shape, generator=random).to(dtype))
                for name, x in leaves.items()
            }
            plain = evaluate(stock, near, positional, options, dtype, keep)
            draws.append((plain, exact(near)))
        assert_close_to_reference(got, same, exact(leaves), draws=draws)


def padding(kind, batch, length):
    """(batch, length) bool, True at padding; every sequence keeps a token, the first all of them.

    kind: "right", "left" or "holes".
    """
    lengths = [max(1, length - 2 * b) for b in range(batch)]
    position = torch.arange(length)
    if kind == "holes":
        random = torch.Generator().manual_seed(3)
        drop = torch.rand(batch, length, generator=random) < 0.4
        return drop & (position > 0)
    behind = position >= torch.tensor(lengths)[:, None]
    return behind if kind == "right" else behind.flip(1)


def added(mask):
    """The float mask that says what the bool `mask` says."""
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def causal(length, keys=None):
    """(length, keys) bool, True where the future is."""
    return torch.ones(length, keys or length, dtype=torch.bool).triu(1)


def layers(**config):
    return twins("TransformerEncoderLayer", **{**LAYER, **config})


def src(batch_first=True):
    return torch.randn((B, T, C) if batch_first else (T, B, C))


def masks(name, B, H, T, S, mask="attn_mask", padding_mask="key_padding_mask"):
    """Arguments of forward, the hint of a causal mask with it; no row is masked entirely."""
    made = {}
    random = torch.Generator().manual_seed(5)
    for part in name.split("+"):
        kind, _, form = part.partition("-")
        if kind in ("right", "left", "holes"):
            drop = padding(kind, B, S)
            made[padding_mask] = added(drop) if form == "float" else drop
        elif kind == "causal":
            drop = causal(T, S)
            made |= {mask: added(drop) if form == "float" else drop, "is_causal": True}
        elif kind != "none":
            shape = (B * H, T, S) if form == "3d" else (T, S)
            drop = torch.rand(shape, generator=random) < 0.4
            drop[..., 0] = drop[..., -1] = False
            numbers = torch.randn(shape, generator=random)
            made[mask] = numbers.masked_fill(drop, -torch.inf) if kind == "float" else drop
    return made


def encoder_masks(name, mask="src_mask"):
    return masks(name, B, LAYER["nhead"], T, T, mask, "src_key_padding_mask")


def tokens(options):
    """(batch, T) bool, or None where there is no padding."""
    drop = options.get("src_key_padding_mask")
    return None if drop is None else ~drop if drop.dtype == torch.bool else drop == 0
