"""What a setting may be: distributions by name, each a function of one number that is uniform in [0, 1).

The number follows from (seed, index, field) alone, so a trial does not change when other fields come or go, or when a
sweep gets more trials.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from mpl_scale.config.names import Registry, require_known

Draw = Callable[[float], Any]
"""From a number in [0, 1) to a value of the field."""
DISTRIBUTIONS: Registry[Callable[[Any], Draw]] = Registry("distribution")
"""By name: what stands behind the name in a spec -> Draw. ValueError says what should stand there."""
DIGITS = 6
"""Significant digits of a number that is drawn: more tell nothing, and files of overrides are read by people."""


@DISTRIBUTIONS.register("choices")
def _choices(given: Any) -> Draw:
    """A choice among values, all equally likely."""
    if not isinstance(given, list) or not given:
        raise ValueError("must be a list of at least one value")
    return lambda u: given[int(u * len(given))]


@DISTRIBUTIONS.register("uniform")
def _uniform(given: Any) -> Draw:
    """A number between two others."""
    low, high = _bounds(given)
    return lambda u: _rounded(low + u * (high - low), low, high)


@DISTRIBUTIONS.register("log_uniform")
def _log_uniform(given: Any) -> Draw:
    """A number whose logarithm is uniform: learning rates, weight decays."""
    low, high = _bounds(given)
    if low <= 0:
        raise ValueError("must be two numbers above 0")
    return lambda u: _rounded(low * math.exp(u * math.log(high / low)), low, high)


def parse(field: str, given: Any) -> Draw:
    """A field's distribution, as {"log_uniform": [0.01, 1]}. ValueError names the field, the value and the fix."""
    where = f"space.{field}"
    if not isinstance(given, Mapping) or len(given) != 1:
        names = " or ".join(f'{{"{name}": [...]}}' for name in DISTRIBUTIONS)
        raise ValueError(f"{where} = {given!r}: must be one of {names}")
    ((name, value),) = given.items()
    require_known(where, name, DISTRIBUTIONS)
    try:
        return DISTRIBUTIONS[name](value)
    except ValueError as error:
        raise ValueError(f"{where}.{name} = {value!r}: {error}") from None


def uniform(*, seed: int, index: int, field: str) -> float:
    """The number in [0, 1) that decides a field of a trial: 53 bits of a SHA-256."""
    digest = hashlib.sha256(f"{seed}/{index}/{field}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _bounds(given: Any) -> tuple[float, float]:
    numbers = isinstance(given, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in given
    )
    if not numbers or len(given) != 2 or given[0] >= given[1]:
        raise ValueError("must be two numbers, the lower one first")
    return float(given[0]), float(given[1])


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)
