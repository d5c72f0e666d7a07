"""The demo's text: "Alice's Adventures in Wonderland", whole, from the file beside this one."""

import re
from importlib.resources import files

SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]['")]))\s+(?=['"(]?[A-Z])""")


def paragraphs() -> list[str]:
    """The paragraphs of the book, in order."""
    text = files("fast_transformer.cli").joinpath("alice.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def sentences() -> list[str]:
    """The sentences of the book, each once, in order."""
    return list(dict.fromkeys(s for p in paragraphs() for s in SENTENCE_END.split(p)))
