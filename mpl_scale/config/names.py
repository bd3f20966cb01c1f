"""One wording for a name that no registry knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 40
"""Names listed where none is close."""


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
