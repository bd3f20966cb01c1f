"""Which parameters of a test run in `make test`; those marked `full` repeat its proof in `make test-full`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest


def full(*values: Any) -> Any:
    """Parameters for `make test-full`."""
    return pytest.param(*values, marks=pytest.mark.full)


def crossed(
    names: str, *axes: Sequence[Any], quick: Collection[tuple[Any, ...]], ids: Callable[[Any], str] = str
) -> pytest.MarkDecorator:
    """Every combination of the axes' values; those in `quick` run in `make test` as well."""
    combinations = list(itertools.product(*axes))
    assert all(chosen in combinations for chosen in quick), "quick names what no axis has"
    return pytest.mark.parametrize(
        names, [values if values in quick else full(*values) for values in combinations], ids=ids
    )
