"""GPT-2 small as a whole model: greedy decoding through generate(), and a training step."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fast_transformer as ft
from fast_transformer.benchmarks.races import DTYPES, Programme, Race, errors, objection

PROMPT, NEW = 32, 64
TRAINED = 512  # tokens of one sequence
JUDGED = 8  # tokens, each a step on the cache
FLOOR = 64 * torch.finfo(torch.float32).eps
GRADIENT_FLOOR = 1e-3  # a gradient has met many sums, each in an order of its own


def gpt2(layers: int = 12, **options: int) -> nn.Module:
    """The language model of transformers; the sizes of GPT-2 small, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, attn_implementation="sdpa", **options)
    return GPT2LMHeadModel(config).eval()


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    """The model, every dropout of which has this rate."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


def generate(model: nn.Module, prompt: Tensor, **options: object) -> Callable[[], Tensor]:
    """Greedy decoding of `NEW` tokens a row."""
    mask = torch.ones_like(prompt)

    def call():
        return model.generate(
            prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0, **options,
        )  # fmt: skip

    return call


def stepwise(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The logits of the last `JUDGED` tokens, each computed by itself on the cache before it."""
    with torch.no_grad():
        out = model(tokens[:, :-JUDGED], use_cache=True)
        parts = []
        for token in tokens[:, -JUDGED:].split(1, dim=1):
            out = model(token, cache=out.cache, use_cache=True)
            parts.append(out.logits)
    return {"logits": torch.cat(parts, 1).float()}


def train(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """Forward and backward of the language model's loss; no optimizer."""

    def step():
        model(tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=False)

    return step


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Of every parameter, without dropout."""
    model.eval()
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def flops(model: nn.Module, tokens: Tensor) -> float:
    """Of one forward pass: the products with weights, the head among them, and attention."""
    config, (batch, length) = model.config, tokens.shape
    blocks = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    weights = blocks + model.lm_head.weight.numel()
    attention = 4 * config.n_layer * config.n_embd * length * (length + 1) / 2
    return batch * (2.0 * weights * length + attention)


def weight_bytes(model: nn.Module) -> int:
    """What one step of decoding reads of the weights; one row of the embeddings is nothing."""
    parameters = (*model.transformer.h.parameters(), model.lm_head.weight)
    return sum(p.numel() * p.element_size() for p in parameters)


def races(build: Callable[[], nn.Module], name: str, programme: Programme) -> Iterator[Race]:
    """Decoding of one row and of eight, a training step with and without dropout."""
    exact, full = build(), programme.full
    vocabulary, length = exact.config.vocab_size, min(TRAINED, exact.config.n_positions)
    for dtype in programme.dtypes:
        stock = copy.deepcopy(exact).to(DTYPES[dtype])
        models = ft.accelerate(copy.deepcopy(stock)), stock, exact
        for batch in (1, 8) if full else (1,):
            prompt = torch.randint(0, vocabulary, (batch, PROMPT))
            label = f"{name} decode B{batch}"
            if programme.wants(label):
                yield _decode(label, *models, prompt, dtype, programme.compiled)
        tokens = torch.randint(0, vocabulary, (1, length))
        for dropout in (0.1, 0.0) if full else (0.1,):
            label = f"{name} 1×{length} training, dropout {dropout}"
            if programme.wants(label):
                for model in models[:2]:
                    with_dropout(model, dropout)
                yield _training(label, *models, tokens, dtype, programme.compiled)


def _decode(label, ours, stock, exact, prompt, dtype, compiled) -> Race:
    ours.eval(), stock.eval()
    truth = stepwise(exact, prompt)
    error, plain_error = errors(stepwise(ours, prompt), stepwise(stock, prompt), truth)
    calls = {"ours": generate(ours, prompt), "pytorch": generate(stock, prompt)}
    wrong = objection(error, plain_error, FLOOR)
    if wrong is None and dtype == "fp32" and not torch.equal(*(c() for c in calls.values())):
        wrong = "its tokens are not those of the stock model"
    if compiled:
        from transformers.generation import CompileConfig

        torch._dynamo.reset()
        config = CompileConfig(mode="default")
        config._compile_all_devices = True  # else generate() compiles for GPUs alone
        calls["compiled"] = generate(
            copy.deepcopy(stock), prompt, cache_implementation="static", compile_config=config
        )
    return Race(
        label, "decode", dtype, "", calls, {}, wrong, error, plain_error,
        bytes=weight_bytes(stock), times=NEW, long=True,
    )  # fmt: skip


def _training(label, ours, stock, exact, tokens, dtype, compiled) -> Race:
    truth = gradients(exact, tokens)
    error, plain_error = errors(gradients(ours, tokens), gradients(stock, tokens), truth)
    ours.train(), stock.train()
    calls = {"ours": train(ours, tokens), "pytorch": train(stock, tokens)}
    if compiled:
        torch._dynamo.reset()
        calls["compiled"] = train(torch.compile(copy.deepcopy(stock), dynamic=False), tokens)
    return Race(
        label, "training", dtype, "", calls, {},
        objection(error, plain_error, GRADIENT_FLOOR), error, plain_error,
        flops=3 * flops(stock, tokens), long=True,
    )  # fmt: skip
