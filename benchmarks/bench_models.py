"""Whole models, accelerated and as they come: inference and a training step.

Weights are random; `fast-transformer demo` times a pre-trained model on real text. A model whose
output strays from the stock fp32 one's by more than twice what the stock model does is not timed.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

import fast_transformer as ft

SUITE = "models"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((1, 32), (1, 128), (8, 128), (32, 128), (8, 512))  # batch, length
TRAINED = (8, 128)
Pair = tuple[Callable[[], object], Callable[[], object]]


def bert(width: int, layers: int) -> nn.Module:
    """A BERT encoder of transformers, as in all-MiniLM-L6 (384) and BERT-base (768)."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=4 * width, attn_implementation="sdpa",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def torch_encoder(width: int, layers: int) -> nn.Module:
    """torch.nn.TransformerEncoder, as its documentation builds it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


MODELS = {
    "minilm": lambda: bert(384, 6),
    "bert-base": lambda: bert(768, 12),
    "torch.nn 768": lambda: torch_encoder(768, 6),
}


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


def infer(model: nn.Module, inputs: dict) -> Callable[[], object]:
    """One forward pass without a gradient."""

    def step():
        with torch.inference_mode():
            return model(**inputs)

    return step


def train(model: nn.Module, inputs: dict) -> Callable[[], object]:
    """Forward and backward, dropout included, no optimizer."""

    def step():
        out = model(**inputs)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        out.float().square().mean().backward()
        model.zero_grad(set_to_none=False)

    return step


def tokens(model: nn.Module, inputs: dict) -> torch.Tensor:
    """The model's output where there is text, (tokens, channels) in fp32."""
    with torch.inference_mode():
        out = model(**inputs)
    out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
    if "attention_mask" in inputs:
        return out[inputs["attention_mask"].bool()].float()
    return out[~inputs["src_key_padding_mask"]].float()


def objection(ours: nn.Module, stock: nn.Module, exact: nn.Module, inputs: dict) -> str | None:
    """Why the accelerated model's output is wrong, or None. exact: the stock model in fp32."""
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = tokens(exact, wide)
    error, plain = ((tokens(m, inputs) - truth).abs().max().item() for m in (ours, stock))
    limit = 2 * plain + 32 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    return None if error <= limit else f"off by {error:.1e}, the stock model by {plain:.1e}"


def pairs(
    only: str, dtypes: list[str], quick: bool = False
) -> Iterator[tuple[str, str, Pair | str]]:
    """(name, dtype, (ours, PyTorch's)) or what is wrong in place of the pair, one at a time."""
    shapes = [TRAINED] if quick else SHAPES
    for name, build in MODELS.items():
        if only not in name:
            continue
        exact = build().eval()
        for dtype in dtypes:
            stock = copy.deepcopy(exact).to(DTYPES[dtype])
            ours = copy.deepcopy(stock)
            ft.accelerate(ours)
            for batch, length in shapes:
                for fill in (1.0, 0.6) if batch > 1 else (1.0,):
                    inputs = inputs_of(stock, batch, length, fill, DTYPES[dtype])
                    label = f"{name} {batch}×{length} {fill:.0%}"
                    both = ours.eval(), stock.eval()
                    wrong = objection(*both, exact, inputs)
                    yield (
                        f"{label} inference",
                        dtype,
                        wrong or tuple(infer(m, inputs) for m in both),
                    )
                    if (batch, length) == TRAINED:
                        both = ours.train(), stock.train()
                        yield f"{label} training", dtype, tuple(train(m, inputs) for m in both)
