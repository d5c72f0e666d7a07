"""Which backend runs an op: the order, the user's choice, strict mode, and a record of it.

This is the policy alone. An op brings its table {name: Backend}, in the order of `ORDER`, and the
first backend that does not answer `unsupported` with a reason runs. The choice rests on metadata,
so that torch.compile makes it once, at trace time.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

ORDER = ("cuda", "triton", "cpu", "reference")


class Backend(NamedTuple):
    """One implementation of an op; the three take what the op's table says they take.

    forward: computes the op. backward: its gradient, or None where autograd sees through forward.
    unsupported: answers None, or the reason why this call must go elsewhere.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    unsupported: Callable[..., str | None]


class Call(NamedTuple):
    """One call of an op: the backend that ran, and why those before it did not."""

    op: str
    backend: str
    reasons: dict[str, str]


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in ORDER:
        raise ValueError(f"{source}: backend {name!r} is unknown; accepted are {', '.join(ORDER)}.")
    return name


class _Choice(threading.local):
    """What this thread asked for. Not a ContextVar: Dynamo cannot trace one."""

    forced = _known(os.environ.get("FAST_TRANSFORMER_BACKEND") or None, "FAST_TRANSFORMER_BACKEND")
    strict = os.environ.get("FAST_TRANSFORMER_STRICT", "") not in ("", "0")
    calls: list[Call] | None = None


_choice = _Choice()


def choose(op: str, table: dict[str, Backend], *arguments: object) -> str:
    """Return the name of the backend in `table` that runs this call.

    Raises RuntimeError when a forced backend cannot, or when only the reference could in strict
    mode; both name the reasons.
    """
    reasons: dict[str, str] = {}
    forced = _choice.forced
    for name in table if forced is None else (forced,):
        reason = table[name].unsupported(*arguments) if name in table else "has no such op"
        if reason is not None:
            reasons[name] = reason
        elif name == "reference" and forced is None and _choice.strict:
            break
        else:
            if _choice.calls is not None:
                _choice.calls.append(Call(op, name, reasons))
            return name
    because = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if forced is not None:
        raise RuntimeError(f"{op}: the {forced} backend was asked for but cannot run ({because}).")
    raise RuntimeError(f"{op}: strict mode forbids the reference backend ({because}).")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of this thread on one backend: "cuda", "triton", "cpu" or "reference".

    An op that cannot run there raises RuntimeError with the reason. The gradient of a call runs
    where the call ran. `FAST_TRANSFORMER_BACKEND` does the same for the whole process.
    """
    outer = _choice.forced
    _choice.forced = _known(name, "backend")
    try:
        yield
    finally:
        _choice.forced = outer


@contextmanager
def strict() -> Iterator[None]:
    """Raise RuntimeError, with the reason, where an op of this thread would fall to the reference.

    The reference still runs when `backend("reference")` asks for it. `FAST_TRANSFORMER_STRICT=1`
    does the same for the whole process.
    """
    outer = _choice.strict
    _choice.strict = True
    try:
        yield
    finally:
        _choice.strict = outer


@contextmanager
def record() -> Iterator[list[Call]]:
    """Collect a Call for every op that this thread runs, in order."""
    outer = _choice.calls
    calls: list[Call] = []
    _choice.calls = calls
    try:
        yield calls
    finally:
        _choice.calls = outer


def chosen() -> str | None:
    """Return the backend that this thread forces, or None."""
    return _choice.forced
