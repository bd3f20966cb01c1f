"""Bad input that one rank finds is said by all, in its own words; other failures as checkpoint/agree.py has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mpl_scale.checkpoint.agree import on_main, together
from mpl_scale.mesh import Mesh

R = TypeVar("R")


def value_on_main(mesh: Mesh, work: Callable[[], R]) -> R:
    """As agree.on_main, with a ValueError as it is on every rank."""

    def attempt() -> R | ValueError:
        try:
            return work()
        except ValueError as error:
            return error

    found = on_main(mesh, attempt)
    if isinstance(found, ValueError):
        raise found
    return found


def do_together(mesh: Mesh, work: Callable[[], None]) -> None:
    """Do `work` on every rank; the first ValueError of any is raised on all."""

    def attempt() -> ValueError | None:
        try:
            work()
        except ValueError as error:
            return error
        return None

    found = together(mesh, attempt, lambda errors: next((error for error in errors if error is not None), None))
    if found is not None:
        raise found
