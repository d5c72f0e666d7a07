"""`fast-transformer demo`: a pre-trained sentence encoder, as it comes and accelerated.

It embeds every sentence of a book with both, shows that they agree, searches, undoes the swap, and
times both side by side. All figures go to figures.json, the picture to speed.png.
"""

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import fast_transformer as ft
from fast_transformer.cli.book import sentences
from fast_transformer.cli.comparison import (
    STOCK,
    SWAPPED,
    Answer,
    Findings,
    Speed,
    accelerated,
    agreement,
    calls,
    restores,
)
from fast_transformer.cli.encoder import (
    Batch,
    Tokenizer,
    embed,
    fill,
    flops,
    full_batch,
    hidden,
    load,
    minilm,
    mixed_batch,
)
from fast_transformer.cli.plot import draw
from fast_transformer.cli.report import tell
from fast_transformer.timing import conditions, interleaved, measurements, peak_flops, steady

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUERIES = (
    "an animal disappears until nothing but its smile is left",
    "a watch that does not tell what o'clock it is",
    "she wants everybody to be executed",
)
Models = dict[tuple[str, str], nn.Module]  # (side, dtype)
Ticker = Callable[[str, int], Callable[..., object]]  # (description, total) -> advance


def run(output: Path, runs: int, threads: int | None, quick: bool) -> None:
    """Tell the story on the terminal and write its figures into the folder `output`."""
    console = Console()
    steady(threads)
    columns = (TextColumn("{task.description:38}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:

        def ticker(description: str, total: int) -> Callable[..., object]:
            task = progress.add_task(description, total=total)
            return lambda n=1: progress.advance(task, n)

        findings = find(runs, quick, ticker)
    tell(console, findings)

    output.mkdir(parents=True, exist_ok=True)
    figures, picture = output / "figures.json", output / "speed.png"
    figures.write_text(json.dumps(findings.figures(), indent=2, default=str) + "\n")
    draw(findings, picture)
    console.print(f"Wrote {figures} and {picture}.", soft_wrap=True)
    if wrong := findings.failures():
        sys.exit("The demo failed: " + "; ".join(wrong) + ".")


def find(runs: int, quick: bool, ticker: Ticker) -> Findings:
    """Compare the stock model and its accelerated copy in every respect."""
    tokenizer, model = Tokenizer(minilm()), load(minilm())
    models: Models = {
        (STOCK, name): copy.deepcopy(model).to(dtype) for name, dtype in DTYPES.items()
    }
    for dtype in DTYPES:
        models[SWAPPED, dtype] = accelerated(models[STOCK, dtype])
    texts = sentences()[:: 9 if quick else 1]
    size, length = (8, 64) if quick else (32, 128)
    batches = {
        "full": full_batch(tokenizer, size, length),
        "mixed": mixed_batch(tokenizer, size, length, 0.6),
    }
    vectors = {
        key: embed(each, tokenizer, texts, ticker(f"Embedding a book: {' '.join(key)}", len(texts)))
        for key, each in models.items()
    }
    answers = []
    for side in (STOCK, SWAPPED):
        queries = embed(models[side, "fp32"], tokenizer, list(QUERIES))
        best = (queries @ vectors[side, "fp32"].T).max(1)
        for query, score, place in zip(QUERIES, *(x.tolist() for x in best), strict=True):
            answers.append(Answer(query, side, texts[place], score))
    return Findings(
        conditions=conditions(),
        runs=runs,
        agreements={k: agreement(v, vectors[STOCK, "fp32"]) for k, v in vectors.items()},
        answers=answers,
        speeds=speeds(models, batches, runs, ticker),
        calls={dtype: calls(models[SWAPPED, dtype], batches["mixed"]) for dtype in DTYPES},
        explanation=str(ft.explain(models[SWAPPED, "fp32"], **batches["mixed"])),
        restored=all(restores(models[STOCK, dtype], batches["mixed"]) for dtype in DTYPES),
    )


def speeds(models: Models, batches: dict[str, Batch], runs: int, ticker: Ticker) -> list[Speed]:
    """Time every model on every batch, all of them side by side."""
    work = {
        (side, dtype, name): partial(hidden, model, batch)
        for (side, dtype), model in models.items()
        for name, batch in batches.items()
    }
    tick = ticker("Timing side by side", measurements(work, runs))
    timings = interleaved(work, runs, tick=tick)
    return [
        Speed(
            dtype=dtype,
            batch=name,
            fill=fill(batch),
            sentences=batch["input_ids"].shape[0],
            tokens=batch["input_ids"].shape[1],
            flops=flops(models[STOCK, dtype], batch),
            core_peak=peak_flops(DTYPES[dtype]),
            stock=timings[STOCK, dtype, name],
            ours=timings[SWAPPED, dtype, name],
        )
        for dtype in DTYPES
        for name, batch in batches.items()
    ]
