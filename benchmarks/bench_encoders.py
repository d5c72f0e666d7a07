"""Encoders as whole models: inference against every runtime at hand, and a training step."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fast_transformer as ft
from fast_transformer.benchmarks.races import DTYPES, Programme, Race, errors, objection
from fast_transformer.benchmarks.runtimes import runtimes

USUAL = ((1, 32), (8, 128))  # batch, length
SHAPES = tuple((batch, length) for batch in (1, 8, 32) for length in (32, 128, 512))
TRAINED = (8, 128)
FLOOR = 32 * torch.finfo(torch.float32).eps
PEER_FLOOR = 1e-4  # CTranslate2 has a GELU of its own
GRADIENT_FLOOR = 1e-3  # a gradient has met many sums, each in an order of its own


def bert(width: int, layers: int, dropout: float = 0.1) -> nn.Module:
    """A BERT encoder of transformers, as in all-MiniLM-L6 (384) and BERT-base (768)."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=4 * width, attn_implementation="sdpa", hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def torch_encoder(width: int, layers: int) -> nn.Module:
    """torch.nn.TransformerEncoder, as its documentation builds it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


def inputs_of(model: nn.Module, batch: int, length: int, fill: float, dtype: torch.dtype) -> dict:
    """Arguments of the model's forward; lengths are spread evenly around fill · length."""
    low = 2 * fill - 1
    lengths = torch.tensor([length * (low + (1 - low) * (b + 0.5) / batch) for b in range(batch)])
    real = torch.arange(length) < lengths.round()[:, None]
    if isinstance(model, nn.TransformerEncoder):
        width = model.layers[0].linear1.in_features
        x = torch.randn(batch, length, width, dtype=dtype)
        return {"src": x, "src_key_padding_mask": ~real}
    ids = torch.randint(1000, 20000, (batch, length))
    return {"input_ids": ids, "attention_mask": real.long()}


def real(inputs: dict) -> Tensor:
    """(batch, length) bool: where there is a token."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].bool()
    return ~inputs["src_key_padding_mask"]


def output(model: nn.Module, inputs: dict) -> Tensor:
    """(batch, length, C)."""
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def infer(model: nn.Module, inputs: dict) -> Callable[[], object]:
    """One forward pass without a gradient."""

    def step():
        with torch.inference_mode():
            return output(model, inputs)

    return step


def train(model: nn.Module, inputs: dict) -> Callable[[], object]:
    """Forward and backward, dropout included, no optimizer."""

    def step():
        loss(model, inputs).backward()
        model.zero_grad(set_to_none=False)

    return step


def loss(model: nn.Module, inputs: dict) -> Tensor:
    """The mean square of what stands where there are tokens."""
    return output(model, inputs)[real(inputs)].float().square().mean()


def wide(inputs: dict) -> dict:
    """The same in fp32."""
    return {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}


def gradients(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    """Of every parameter, without dropout."""
    model.eval()
    model.zero_grad()
    loss(model, inputs).backward()
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def flops(model: nn.Module, inputs: dict) -> float:
    """Of one forward pass over what is no padding."""
    layers = model.layers if isinstance(model, nn.TransformerEncoder) else model.encoder.layer
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    lengths = real(inputs).sum(1).double()
    width = next(p.shape[0] for p in layers.parameters() if p.dim() == 1)
    return float((2 * weights * lengths + 4 * len(layers) * width * lengths**2).sum())


def races(build: Callable[[], nn.Module], name: str, programme: Programme) -> Iterator[Race]:
    """Inference at every shape and fill, and a training step, of one model."""
    exact = build().eval()
    for dtype in programme.dtypes:
        stock = copy.deepcopy(exact).to(DTYPES[dtype])
        # other runtimes lay their weights out ahead, too
        ours = ft.accelerate(copy.deepcopy(stock), inference=True)
        others: dict = {}
        for batch, length in SHAPES if programme.full else USUAL:
            for fill in (1.0, 0.6) if batch > 1 else (1.0,):
                inputs = inputs_of(stock, batch, length, fill, DTYPES[dtype])
                label = f"{name} {batch}×{length} {fill:.0%}"
                models = ours, stock, exact
                if programme.wants(f"{label} inference"):
                    others = others or _others(exact, stock, inputs, dtype, programme.compiled)
                    yield _inference(f"{label} inference", *models, inputs, dtype, others)
                usual = programme.full or fill < 1 or dtype == "bf16"
                if (batch, length) == TRAINED and usual and programme.wants(f"{label} training"):
                    yield _training(f"{label} training", *models, inputs, dtype, programme.compiled)


def _others(exact: nn.Module, stock: nn.Module, inputs: dict, dtype: str, compiled: bool) -> dict:
    found: dict = {"made": {}, "missing": {}, "compiled": None}
    if "input_ids" in inputs:
        found["made"], found["missing"] = runtimes(
            exact, inputs["input_ids"], inputs["attention_mask"], dtype
        )
    if compiled:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(copy.deepcopy(stock).eval(), dynamic=False)
    return found


def _inference(label, ours, stock, exact, inputs, dtype, others) -> Race:
    ours.eval(), stock.eval()
    keep = real(inputs)
    with torch.inference_mode():
        truth = {"out": output(exact, wide(inputs))[keep]}
        found, plain = ({"out": output(m, inputs)[keep]} for m in (ours, stock))
    error, plain_error = errors(found, plain, truth)
    calls = {"ours": infer(ours, inputs), "pytorch": infer(stock, inputs)}
    missing = dict(others["missing"])
    if others["compiled"] is not None:
        calls["compiled"] = infer(others["compiled"], inputs)
    for name, run in others["made"].items():
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        off, _ = errors({"out": run(ids, mask)[keep]}, plain, truth)
        wrong = objection(off, plain_error, PEER_FLOOR)
        if wrong is None:
            calls[name] = lambda run=run, ids=ids, mask=mask: run(ids, mask)
        else:
            missing[name] = f"its answer is {wrong}"
    work = flops(stock, inputs)
    return Race(
        label, "inference", dtype, "", calls, missing,
        objection(error, plain_error, FLOOR), error, plain_error, flops=work, long=work > 5e10,
    )  # fmt: skip


def _training(label, ours, stock, exact, inputs, dtype, compiled) -> Race:
    truth = gradients(exact, wide(inputs))
    error, plain_error = errors(gradients(ours, inputs), gradients(stock, inputs), truth)
    ours.train(), stock.train()
    calls = {"ours": train(ours, inputs), "pytorch": train(stock, inputs)}
    if compiled:
        torch._dynamo.reset()
        calls["compiled"] = train(torch.compile(copy.deepcopy(stock), dynamic=False), inputs)
    work = 3 * flops(stock, inputs)
    return Race(
        label, "training", dtype, "", calls, {},
        objection(error, plain_error, GRADIENT_FLOOR), error, plain_error, flops=work,
        long=work > 5e10,
    )  # fmt: skip
