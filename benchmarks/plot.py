"""The picture of attention: what part of the processor's peak it reaches, over the length."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import ScalarFormatter  # noqa: E402

from fast_transformer.benchmarks.report import setting  # noqa: E402

HEAD_DIM = 64
KINDS = {"full": "full", "causal": "causal (half the products)"}
SIDES = {"ours": ("fast_transformer", "#1f6feb", "-"), "sdpa": ("PyTorch SDPA", "#6e7781", "-"),
         "formula": ("PyTorch, the formula", "#b8bfc9", "--")}  # fmt: skip


def points(
    results: Iterable[Mapping[str, Any]], kind: str, dtype: str, side: str
) -> list[tuple[int, float]]:
    """(length, fraction of the peak) of the forward passes of one kind, by length."""
    found = {}
    for r in results:
        wanted = (r["suite"], r["kind"], r["dtype"], r["step"]) == (
            "attention", kind, dtype, "forward",
        )  # fmt: skip
        if not wanted or not r["case"].startswith(f"{kind}-T") or side not in r["timings"]:
            continue
        length, head_dim = r["shape"][2], r["shape"][4]
        part = r["timings"][side]["of_limit"]
        if head_dim == HEAD_DIM and part is not None:
            found[length] = part
    return sorted(found.items())


def draw(run: Mapping[str, Any], path: Path) -> None:
    """Draw one field for each dtype and kind; ValueError where there is nothing to draw."""
    results = run["results"]
    dtypes = list(dict.fromkeys(r["dtype"] for r in results if points([r], r["kind"], r["dtype"],
                                                                      "ours")))  # fmt: skip
    if not dtypes:
        raise ValueError(
            f"there is no attention forward at head_dim {HEAD_DIM}, full or causal, with a limit"
        )
    figure, fields = plt.subplots(
        len(dtypes), len(KINDS), figsize=(9, 0.8 + 2.7 * len(dtypes)), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, dtype in zip(fields, dtypes, strict=True):
        for axes, (kind, title) in zip(row, KINDS.items(), strict=True):
            for side, (label, color, style) in SIDES.items():
                if places := points(results, kind, dtype, side):
                    lengths, parts = zip(*places, strict=True)
                    percent = [100 * part for part in parts]
                    axes.plot(lengths, percent, style, marker="o", ms=3, color=color, label=label)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.set_ylim(bottom=0)
            axes.set_title(f"{dtype}, {title}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        row[0].set_ylabel("% of the measured peak")
    for axes in fields[-1]:
        axes.set_xlabel("length")
    fields[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"attention forward, head_dim {HEAD_DIM}, {setting(run['conditions'])}", fontsize=10
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)
