"""Writes tables into README.md: `python benchmarks/readme.py FILE…`.

A file is what the demo wrote, figures.json, a run of the suite attention or decode, which has a
table of its own, or a run of models or of all suites; it tells which itself.
What stands between the markers is never edited by hand.
"""

import json
import sys
from pathlib import Path

from fast_transformer.benchmarks.report import Mean, means, setting

README = Path(__file__).parent.parent / "README.md"
ATTENTION_ROWS = {  # (kind, step) -> what a reader calls it
    ("full", "forward"): "full",
    ("causal", "forward"): "causal",
    ("varlen", "forward"): "packed sequences, against padded ones",
    ("padded", "forward"): "padded",
    ("bias", "forward"): "boolean or additive mask",
    ("window", "forward"): "sliding window",
    ("alibi", "forward"): "ALiBi",
    ("softcap", "forward"): "softcap",
    ("gqa", "forward"): "heads that share keys and values",
    ("value-dim", "forward"): "values wider than keys",
    ("dropout", "forward"): "dropout",
    ("full", "backward"): "full, backward",
    ("causal", "backward"): "causal, backward",
    ("varlen", "backward"): "packed sequences, backward",
    ("dropout", "backward"): "dropout, backward",
    ("bias-gradient", "backward"): "mask with a gradient, backward",
}
DECODE_ROWS = {
    ("decode", "forward"): "one token",
    ("decode-gqa", "forward"): "one token, heads that share keys and values",
    ("decode-tokens", "forward"): "several tokens at once",
    ("decode-paged", "forward"): "paged cache",
}
TABLES = {  # the markers' name -> what is counted, and the rows
    "bench-attention": ("attention", ATTENTION_ROWS),
    "bench-decode": ("decoding on a cache", DECODE_ROWS),
}


OP_SUITES = {  # of a run of all: what a reader calls a suite's steps
    "attention": "attention",
    "relative": "relative attention",
    "decode": "decoding on a cache",
    "norm": "norms",
    "mlp": "linear layers and MLPs",
    "loss": "losses",
    "rotary": "rotary embeddings",
    "embedding": "embeddings",
    "optimizer": "AdamW",
}


def demo(figures: dict) -> str:
    """The demo's figures in Markdown."""
    lines = [
        "| all-MiniLM-L6-v2, real text | transformers (SDPA) | fast_transformer | speed-up |",
        "|---|---:|---:|---:|",
    ]
    for s in figures["speed"]:
        cells = [
            f"{side['median_seconds'] * 1e3:.0f} ms, {side['sentences_per_second']:.0f} sentences/s"
            for side in (s["stock"], s["ours"])
        ]
        batch = f"{s['dtype']}, {s['sentences']}×{s['tokens']}, {s['fill']:.0%} filled"
        lines.append(f"| {batch} | {' | '.join(cells)} | **{s['ratio']:.2f}×** |")
    lines += [
        "",
        "| embeddings against transformers fp32 | max error | min cosine | same neighbour |",
        "|---|---:|---:|---:|",
    ]
    for side, a in figures["agreement"].items():
        if side != "transformers fp32":
            same = f"{a['neighbours']:,} of {a['sentences']:,}"
            lines.append(f"| {side} | {a['max_error']:.1e} | {a['min_cosine']:.6f} | {same} |")
    c = figures["conditions"]
    lines += [
        "",
        f"Medians of {figures['runs']} interleaved runs in one process, {c['threads']} threads of "
        f"{c['processor']} ({c['isa']}), torch {c['torch']}, {c['date'][:10]}.",
    ]
    return "\n".join(lines)


def of_rows(run: dict, rows: dict) -> list[dict]:
    """What a run found of the kinds in `rows`."""
    kinds = {kind for kind, _ in rows}
    return [r for r in run.get("results", ()) if r["kind"] in kinds]


def suite(run: dict, what: str, rows: dict) -> str:
    """A suite's means in Markdown: a row a kind, a column a dtype."""
    results = of_rows(run, rows)
    found = means(results)
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    lines = [
        f"| {what}, times faster | {' | '.join(dtypes)} |",
        f"|---|{'---:|' * len(dtypes)}",
    ]
    for key, name in rows.items():
        if key in found:
            cells = " | ".join(mean(found[key].get(dtype)) for dtype in dtypes)
            lines.append(f"| {name} | {cells} |")
    behind = sum(r["behind"] for r in results if not r["wrong"])
    lines += [
        "",
        f"Geometric means, in parentheses the worst point, over the fastest of {peers(results)} "
        f"at each of {len(results)} points; PyTorch is ahead at {behind}. {measured(run)}",
    ]
    return "\n".join(lines)


def measured(run: dict) -> str:
    """How and on what a run was timed, in a sentence."""
    c = run["conditions"]
    return (
        f"Medians of {c['rounds']} interleaved rounds, {setting(c)}, torch {c['torch']}, "
        f"{c['date'][:10]}."
    )


def ops(run: dict) -> str:
    """The means of every op of a run of all suites: a row a kind and pass."""
    lines = ["| times faster than PyTorch's best way | fp32 | bf16 |", "|---|---:|---:|"]
    points = behind = 0
    for name, words in OP_SUITES.items():
        results = [r for r in run["results"] if r["suite"] == name]
        points += sum(not r["wrong"] for r in results)
        behind += sum(r["behind"] for r in results if not r["wrong"])
        lines.append(f"| **{words}** | | |")
        for (kind, step), by in means(results).items():
            cells = " | ".join(mean(by.get(dtype)) for dtype in ("fp32", "bf16"))
            lines.append(f"| {kind}{', ' if step else ''}{step} | {cells} |")
    lines += [
        "",
        f"Geometric means, in parentheses the worst point, of {points} points; PyTorch is ahead at "
        f"{behind}. {measured(run)}",
    ]
    return "\n".join(lines)


def models(run: dict) -> str:
    """Whole models of a run: a row a race."""
    lines = ["| model | dtype | ours | best peer | |", "|---|---|---:|---:|---:|"]
    missing: dict[str, str] = {}
    for r in run["results"]:
        if r["suite"] != "models":
            continue
        missing |= {name: f"{reason} ({r['dtype']})" for name, reason in r["unavailable"].items()}
        name = f"{r['case']} {r['step']}".strip()
        if r["wrong"]:
            lines.append(f"| {name} | {r['dtype']} | wrong: {r['wrong']} | | |")
            continue
        ours = r["timings"]["ours"]["median_seconds"] * 1e3
        best, ratio = r["best_peer"], r["ratio"]
        peer = f"{best}, {r['timings'][best]['median_seconds'] * 1e3:.1f} ms" if best else "none"
        speed = f"**{ratio:.2f}×**" if best else ""
        lines.append(f"| {name} | {r['dtype']} | {ours:.1f} ms | {peer} | {speed} |")
    if missing:
        absent = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        lines += ["", f"Not everywhere took part: {absent}."]
    return "\n".join(lines)


def mean(found: Mean | None) -> str:
    """One cell."""
    return "" if found is None else f"**{found.mean:.2f}×** ({found.worst:.2f}×)"


def peers(results: list[dict]) -> str:
    """Whom ours was measured against, in words."""
    words = {"sdpa": "SDPA", "repeated": "SDPA on repeated heads", "formula": "the plain formula",
             "compiled": "the formula compiled",
             "flex": "flex_attention"}  # fmt: skip
    met = {name for r in results for name in r["timings"]}
    *first, last = [word for name, word in words.items() if name in met]
    return f"{', '.join(first)} and {last}" if first else last


def write(name: str, table: str) -> None:
    """Put a table between its markers."""
    begin, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = README.read_text().split(begin)
    after = rest.split(end)[1]
    README.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def main() -> None:
    """Rewrite the README."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        figures = json.loads(Path(name).read_text())
        if "agreement" in figures:
            write("demo", demo(figures))
            continue
        suites = {r["suite"] for r in figures.get("results", ())}
        if len(suites) > 1:
            write("bench-ops", ops(figures))
        if "models" in suites:
            write("bench-models", models(figures))
        if len(suites) > 1 or "models" in suites:
            continue
        found = {name: rows for name, (_, rows) in TABLES.items() if of_rows(figures, rows)}
        if not found:
            sys.exit(f"{name} holds neither the demo's figures nor a run of a suite with a table.")
        for table, rows in found.items():
            write(table, suite(figures, TABLES[table][0], rows))


if __name__ == "__main__":
    main()
