"""What every section of the schema is made of: its base, and numbers with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, lt=2**53)]  # a float64 holds it, JSON's readers do not round it
CountOrZero = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0.1, le=30 * 24 * 3600)]
"""A limit of time: 0.1 s, below which everything is late, to 30 days."""


def refuse_upside_down(name: str, low: float, high: float) -> None:
    """ValueError for a range whose first value is the larger one. For validators, which add the section."""
    if low > high:
        raise ValueError(f"{name} = {[low, high]} is upside down; give the smaller one first")


class Section(BaseModel):
    """Base of every section: frozen, strict about types, closed to unknown keys and to NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
