"""`fast-transformer env`."""

import json

from rich import box
from rich.console import Console
from rich.table import Table

from fast_transformer.timing import conditions


def show(as_json: bool) -> None:
    """Print what `ft.env()` knows, and the processor."""
    facts = conditions()
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for name, value in facts.items():
        if not isinstance(value, dict):
            table.add_row(f"[bold]{name}", _text(value))
        elif value:
            table.add_row(f"[bold]{name}", "")
            for key, inner in value.items():
                table.add_row(f"  {key}", _text(inner))
    Console().print(table)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
