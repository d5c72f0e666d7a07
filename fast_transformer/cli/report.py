"""The demo's findings on the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fast_transformer.cli.comparison import STOCK, SWAPPED, Findings


def tell(console: Console, found: Findings) -> None:
    """Print everything, in the order in which one asks."""
    facts = found.conditions
    console.print(
        f"[bold]fast_transformer {facts['fast_transformer']}[/], kernels for {facts['isa']}, "
        f"{facts['threads']} threads of {facts['processor']}; torch {facts['torch']}"
    )
    console.print(
        f"all-MiniLM-L6-v2 on {found.agreements[SWAPPED, 'fp32'].sentences:,} sentences of "
        "Alice's Adventures in Wonderland"
    )
    console.print()
    console.print(agreement_table(found))
    print_answers(console, found)
    console.print()
    console.print(speed_table(found))
    print_limits(console, found)
    console.print("[bold]What ran where?[/] ft.explain on the mixed batch, fp32:")
    console.print(found.explanation, markup=False, highlight=False, soft_wrap=True)
    console.print()
    console.print(f"ft.restore brings the stock output back to the last bit: {found.restored}")


def agreement_table(found: Findings) -> Table:
    """Errors against the stock fp32 model, and the neighbours that stay."""
    table = _table("embeddings of", "", "max error", "min cosine", "same nearest neighbour")
    table.title = "Do the embeddings agree? Each against transformers in fp32"
    for (side, dtype), a in found.agreements.items():
        if (side, dtype) != (STOCK, "fp32"):
            same = f"{a.neighbours:,} of {a.sentences:,}"
            table.add_row(side, dtype, f"{a.max_error:.1e}", f"{a.min_cosine:.7f}", same)
    return table


def print_answers(console: Console, found: Findings) -> None:
    """Each query with the sentence that both models find, or with the two they find."""
    console.print("[bold]Searching the book, fp32[/]")
    for query in dict.fromkeys(answer.query for answer in found.answers):
        both = {answer.side: answer for answer in found.answers if answer.query == query}
        stock, ours = both[STOCK], both[SWAPPED]
        console.print(f"  [italic]{escape(query)}[/]")
        for answer in (stock, ours) if stock.sentence != ours.sentence else (ours,):
            console.print(f"    {escape(answer.sentence)}", highlight=False)
        console.print(f"    [dim]cosine {stock.cosine:.6f} and, accelerated, {ours.cosine:.6f}")


def speed_table(found: Findings) -> Table:
    """Times and the ratio for each dtype and batch."""
    table = _table(
        *("dtype", "batch", "filled", "transformers", "accelerated", "sentences/s", "speed-up")
    )
    table.title = f"How fast is it? Medians of {found.runs} interleaved runs ± half the quartiles"
    for s in found.speeds:
        times = [f"{t.median * 1e3:.0f} ms ±{t.spread:.0%}" for t in (s.stock, s.ours)]
        rates = f"{s.sentences / s.stock.median:,.0f} → {s.sentences / s.ours.median:,.0f}"
        batch = (f"{s.sentences}×{s.tokens}", f"{s.fill:.0%}")
        table.add_row(s.dtype, *batch, *times, rates, f"[bold]{s.ratio:.2f}×")
    return table


def print_limits(console: Console, found: Findings) -> None:
    """What part of the processor's multiplications the full batches use."""
    threads = found.conditions["threads"]
    for s in found.speeds:
        if s.core_peak and s.batch == "full":
            parts = [s.flops / t.median / s.core_peak / threads for t in (s.stock, s.ours)]
            console.print(
                f"  {s.dtype}, full: of all that {threads} threads can multiply, transformers uses "
                f"{parts[0]:.0%} and fast_transformer {parts[1]:.0%}"
            )


def _table(*columns: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, title_justify="left")
    table.title_style = "bold"
    for column in table.columns[2:]:
        column.justify = "right"
    return table
