"""`fast-transformer demo`: a pre-trained sentence encoder, as it comes and accelerated.

It embeds every sentence of a book with both, shows that they agree, searches, undoes the swap, and
times both side by side. All figures go to figures.json, the picture to speed.png.
"""

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fast_transformer as ft
from fast_transformer.cli.book import sentences
from fast_transformer.cli.comparison import (
    Agreement,
    Calls,
    Speed,
    accelerated,
    agreement,
    calls,
    restores,
)
from fast_transformer.cli.encoder import (
    Tokenizer,
    embed,
    fill,
    full_batch,
    hidden,
    load,
    minilm,
    mixed_batch,
)
from fast_transformer.cli.plot import draw
from fast_transformer.timing import conditions, interleaved, measurements, steady

DTYPES = ("fp32", "bf16")
QUERIES = (
    "an animal disappears until nothing but its smile is left",
    "a watch that does not tell what o'clock it is",
    "she wants everybody to be executed",
)
ERROR_ALLOWED = 1e-5  # fp32 unit vectors against transformers' own; both are off by some 1e-7


def run(output: Path, runs: int, threads: int | None, quick: bool) -> None:
    """Tell the story on the terminal and write its figures into the folder `output`."""
    console = Console()
    steady(threads)
    facts = conditions()
    console.print(
        f"[bold]fast_transformer {facts['fast_transformer']}[/], kernels for {facts['isa']}, "
        f"{facts['threads']} threads of {facts['processor']}; torch {facts['torch']}"
    )
    texts = sentences()[:: 9 if quick else 1]
    tokenizer = Tokenizer(minilm())
    model = load(minilm())
    models = {("transformers", "fp32"): model}
    models["transformers", "bf16"] = copy.deepcopy(model).bfloat16()
    for dtype in DTYPES:
        models["fast_transformer", dtype] = accelerated(models["transformers", dtype])
    size, length = (8, 64) if quick else (32, 128)
    batches = {
        "full": full_batch(tokenizer, size, length),
        "mixed": mixed_batch(tokenizer, size, length, 0.6),
    }
    columns = (TextColumn("{task.description:38}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:

        def ticker(description: str, total: int):
            task = progress.add_task(description, total=total)
            return lambda n=1: progress.advance(task, n)

        vectors = {
            (side, dtype): embed(
                each, tokenizer, texts, ticker(f"Embedding a book: {side} {dtype}", len(texts))
            )
            for (side, dtype), each in models.items()
        }
        work = {
            (*key, name): lambda m=each, b=batch: hidden(m, b)
            for key, each in models.items()
            for name, batch in batches.items()
        }
        timings = interleaved(
            work, runs, tick=ticker("Timing side by side", measurements(work, runs))
        )
    agreements = {
        key: agreement(found, vectors["transformers", "fp32"]) for key, found in vectors.items()
    }
    ran = {dtype: calls(models["fast_transformer", dtype], batches["mixed"]) for dtype in DTYPES}
    restored = all(restores(models["transformers", dtype], batches["mixed"]) for dtype in DTYPES)
    speeds = [
        Speed(
            *(dtype, name, fill(batch), *batch["input_ids"].shape),
            *(timings[side, dtype, name] for side in ("transformers", "fast_transformer")),
        )
        for dtype in DTYPES
        for name, batch in batches.items()
    ]
    explanation = str(ft.explain(models["fast_transformer", "fp32"], **batches["mixed"]))

    console.print(agreement_table(agreements))
    search(console, tokenizer, models, vectors, texts)
    console.print(speed_table(speeds, runs))
    console.print("[bold]What ran where[/] (ft.explain of the accelerated model, mixed batch)")
    console.print(explanation, markup=False, highlight=False, soft_wrap=True)
    console.print(f"After ft.restore the stock output is back, to the last bit: {restored}")

    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "conditions": facts,
        "runs": runs,
        "quick": quick,
        "agreement": {" ".join(key): asdict(value) for key, value in agreements.items()},
        "speed": [speed.figures() for speed in speeds],
        "calls": ran,
        "explain": explanation,
        "restored": restored,
    }
    (output / "figures.json").write_text(json.dumps(figures, indent=2, default=str) + "\n")
    draw(speeds, facts, output / "speed.png")
    console.print(f"Wrote {output / 'figures.json'} and {output / 'speed.png'}.")
    if wrong := failures(agreements["fast_transformer", "fp32"], ran, restored):
        sys.exit("The demo failed: " + "; ".join(wrong) + ".")


def failures(fp32: Agreement, ran: dict[str, Calls], restored: bool) -> list[str]:
    """What does not hold, in words."""
    wrong = []
    if not fp32.max_error <= ERROR_ALLOWED:
        wrong.append(f"fp32 embeddings are off by {fp32.max_error:.1e}")
    if not all(ran.values()):
        wrong.append("the accelerated model called no op of ours")
    for dtype, ops in ran.items():
        fallen = [op for op, backends in ops.items() if "reference" in backends]
        if fallen:
            wrong.append(f"{', '.join(fallen)} in {dtype} fell back to plain PyTorch")
    if not restored:
        wrong.append("ft.restore did not bring the stock output back")
    return wrong


def agreement_table(agreements: dict[tuple[str, str], Agreement]) -> Table:
    """Errors against transformers in fp32, and the neighbours that stay."""
    table = Table(
        *("embeddings of", "", "max error", "min cosine", "same neighbour"),
        title="Do the embeddings agree? Compared with transformers, fp32",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for (side, dtype), a in agreements.items():
        if (side, dtype) != ("transformers", "fp32"):
            same = f"{a.neighbours:,} of {a.sentences:,}"
            table.add_row(side, dtype, f"{a.max_error:.1e}", f"{a.min_cosine:.7f}", same)
    return table


def search(console: Console, tokenizer: Tokenizer, models, vectors, texts: list[str]) -> None:
    """Find the sentence of the book that comes nearest to each query, with both models."""
    console.print("[bold]Searching the book[/]")
    found = {}
    for side in ("transformers", "fast_transformer"):
        queries = embed(models[side, "fp32"], tokenizer, list(QUERIES))
        found[side] = (queries @ vectors[side, "fp32"].T).max(1)
    for i, query in enumerate(QUERIES):
        scores = {side: best.values[i].item() for side, best in found.items()}
        places = {side: int(best.indices[i]) for side, best in found.items()}
        console.print(f"  [italic]{query}[/]")
        for side in found if len(set(places.values())) > 1 else ["fast_transformer"]:
            console.print(f"    {texts[places[side]]}", highlight=False, markup=False)
        listed = ", ".join(f"{side} {score:.6f}" for side, score in scores.items())
        console.print(f"    [dim]cosine: {listed}")


def speed_table(speeds: list[Speed], runs: int) -> Table:
    """Times and the ratio for each dtype and batch."""
    table = Table(
        *("dtype", "batch", "filled", "transformers", "accelerated", "sentences/s", "speed-up"),
        title=f"How fast is it? Median of {runs} interleaved runs, ± half the quartile distance",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for s in speeds:
        times = [f"{t.median * 1e3:.0f} ms ±{t.spread:.0%}" for t in (s.stock, s.ours)]
        rates = f"{s.sentences / s.stock.median:,.0f} → {s.sentences / s.ours.median:,.0f}"
        batch = (f"{s.sentences}×{s.tokens}", f"{s.fill:.0%}")
        table.add_row(s.dtype, *batch, *times, rates, f"[bold]{s.ratio:.2f}×")
    return table
