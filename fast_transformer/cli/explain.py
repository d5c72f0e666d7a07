"""`fast-transformer explain`."""

from pathlib import Path

import torch
from rich.console import Console

import fast_transformer as ft
from fast_transformer.cli.book import sentences
from fast_transformer.cli.encoder import Tokenizer, load, minilm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def show(folder: Path | None, dtype: str) -> None:
    """Accelerate the model of a Hugging Face folder, run it on a few sentences, tell what ran."""
    if dtype not in DTYPES:
        raise SystemExit(f"--dtype is {dtype!r}; accepted are {', '.join(DTYPES)}.")
    folder = folder or minilm()
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} is no Hugging Face folder: it has no config.json.")
    tokenizer = Tokenizer(folder)
    model = load(folder, DTYPES[dtype])
    ft.accelerate(model)
    batch = tokenizer.pad(tokenizer.tokens(sentences()[:8]))
    Console().print(str(ft.explain(model, **batch)), markup=False, highlight=False, soft_wrap=True)
