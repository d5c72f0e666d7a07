"""Writes the demo's table into README.md: `python -m benchmarks.readme FOLDER/figures.json`.

What stands between the markers is never edited by hand.
"""

import json
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def table(figures: dict) -> str:
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


def main() -> None:
    """Rewrite the README."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    figures = json.loads(Path(sys.argv[1]).read_text())
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{after}")


if __name__ == "__main__":
    main()
