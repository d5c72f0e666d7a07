"""Whole models, accelerated and as they come: inference, decoding and a training step.

Weights are random; `fast-transformer demo` times a pre-trained model on real text. A model whose
output or gradients stray from the stock fp32 one's by more than twice what the stock model does is
not timed.
"""

from collections.abc import Callable, Iterator
from functools import partial

from fast_transformer.benchmarks import bench_encoders, bench_gpt2
from fast_transformer.benchmarks.races import DTYPES, Programme, Race

SUITE = "models"
Races = Callable[[Programme], Iterator[Race]]


def _encoder(build: Callable, name: str) -> Races:
    return partial(bench_encoders.races, build, name)


MODELS: dict[str, Races] = {
    "minilm": _encoder(partial(bench_encoders.bert, 384, 6), "minilm"),
    "bert-base": _encoder(partial(bench_encoders.bert, 768, 12), "bert-base"),
    "gpt2": partial(bench_gpt2.races, bench_gpt2.gpt2, "gpt2"),
}
SLOW: dict[str, Races] = {
    "torch.nn 768": _encoder(partial(bench_encoders.torch_encoder, 768, 6), "torch.nn 768"),
}


def races(
    only: str, dtypes: tuple[str, ...], quick: bool, full: bool, compiled: bool
) -> Iterator[Race]:
    """Every race whose name contains `only`; quick: of the first model alone."""
    programme = Programme(only, tuple(d for d in dtypes if d in DTYPES), full, compiled)
    known = [*MODELS.values(), *(SLOW.values() if full else ())]
    for of_model in known[:1] if quick else known:
        yield from of_model(programme)
