"""Things by name: one registry for all kinds of them, and one wording for a name that none knows."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import ClassVar, TypeVar

Value = TypeVar("Value")
Registered = TypeVar("Registered")

SHOWN = 40
"""Names listed where none is close."""


class Registry(dict[str, Value]):
    """Things of one kind by the name a config gives them. `kind` is for errors.

    registrants: the modules outside this package that have registered something, of any kind.
    """

    registrants: ClassVar[set[str]] = set()

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator that makes what it decorates available under the name; ValueError where that is taken."""

        def add(value: Registered) -> Registered:
            self[name] = value  # type: ignore[assignment]
            return value

        return add

    def __setitem__(self, name: str, value: Value) -> None:
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        if (module := _registering()) is not None:
            self.registrants.add(module)
        super().__setitem__(name, value)


def _registering() -> str | None:
    """The module that is calling into this package; None: one of this package."""
    frame: FrameType | None = sys._getframe(1)
    package = __name__.partition(".")[0]
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("importlib."):  # it runs the module below
            return None
        if name.partition(".")[0] != package:
            return str(name)
        frame = frame.f_back
    return None


def require_known(field: str, name: str, known: Iterable[str]) -> None:
    """ValueError that names the field, the value and the closest known names, unless `name` is known."""
    known = list(known)
    if name in known:
        return
    raise ValueError(f"{field} = {name!r} is unknown; {suggest(name, known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """ "did you mean ..." or, where nothing is close, the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known[:SHOWN])}{', ...' if len(known) > SHOWN else ''}"
