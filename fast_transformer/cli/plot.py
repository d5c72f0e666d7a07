"""The demo's picture: sentences a second, stock and accelerated."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window

from matplotlib import pyplot as plt  # noqa: E402

from fast_transformer.cli.comparison import Findings  # noqa: E402


def draw(found: Findings, path: Path) -> None:
    """Draw one pair of bars for each dtype and batch; whiskers are the quartile spread."""
    speeds, facts = found.speeds, found.conditions
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    places = range(len(speeds))
    for shift, side, label, color in (
        (-0.2, "stock", "transformers (SDPA)", "#b8bfc9"),
        (+0.2, "ours", "fast_transformer", "#1f6feb"),
    ):
        timings = [getattr(s, side) for s in speeds]
        rates = [s.sentences / t.median for s, t in zip(speeds, timings, strict=True)]
        spreads = [rate * t.spread for rate, t in zip(rates, timings, strict=True)]
        where = [place + shift for place in places]
        axes.bar(where, rates, 0.38, yerr=spreads, label=label, color=color, capsize=3)
    for place, speed in enumerate(speeds):
        height = speed.sentences / speed.ours.median * (1 + speed.ours.spread)
        axes.annotate(
            f"{speed.ratio:.2f}×", (place + 0.2, height), (0, 5), textcoords="offset points",
            ha="center", weight="bold",
        )  # fmt: skip
    labels = [f"{s.dtype}, {s.sentences}×{s.tokens}\n{s.fill:.0%} filled" for s in speeds]
    axes.set_xticks(places, labels)
    axes.set_ylabel("sentences per second")
    axes.set_title(
        f"all-MiniLM-L6-v2, {facts['threads']} threads of {facts['processor']} ({facts['isa']})",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=160)
    plt.close(figure)
