"""What one forward pass tells the layers inside a model: whose random numbers to draw, and whether BN may learn.

A step runs several passes over the same student (update, feedback) and one over the teacher, on rows that lie on
different ranks. Layers with randomness or statistics hold the model's `Passes` and read `current` when they run, so
no model's forward signature changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpl_scale.philox import uniform

SITES = 1 << 16
"""Random sites a model may have; a pass's stream is its number times this."""


@dataclass(frozen=True)
class Pass:
    """One forward pass in training mode.

    seed: the run's seed. stream: the number of this pass within a step. step: int64 [], on the device.
    rows: int64 [B], the global rows of the batch. update_statistics: whether BN's moving averages see the batch.
    dropout: whether dropout and drop-path act. drawn: see Passes.per_row.
    """

    seed: int
    stream: int
    step: torch.Tensor
    rows: torch.Tensor
    update_statistics: bool = True
    dropout: bool = True
    drawn: list[torch.Tensor] = field(init=False, default_factory=list, repr=False, compare=False)


def within(pass_: Pass | None, module: nn.Module) -> AbstractContextManager[None]:
    """The context to run a module's forward in; None: an empty one."""
    passes: Any = module.passes if pass_ is not None else None  # nn.Module takes attributes for tensors or modules
    return nullcontext() if pass_ is None else passes(pass_)


class Passes:
    """Shared by the layers of one model; counts their random sites."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.follows = False  # forward-mode derivatives: see mpl/forward_mode.py
        self._sites = 0
        self._repeating = False

    def new_site(self) -> int:
        """A number for a layer that draws random numbers, in the order of the module tree."""
        self._sites += 1
        return self._sites - 1

    @contextmanager
    def __call__(self, current: Pass) -> Iterator[None]:
        previous, self.current = self.current, current
        try:
            yield
        finally:
            self.current = previous

    @property
    def learns(self) -> bool:
        """Whether BN's moving averages see this pass: not when it is repeated for a backward pass."""
        return not self._repeating and (self.current is None or self.current.update_statistics)

    def repetition(self) -> AbstractContextManager[None]:
        """A context to run the pass of now again later: the same random numbers, and BN learns nothing."""
        return self._again(self.current)

    @contextmanager
    def _again(self, current: Pass | None) -> Iterator[None]:
        before = self.current, self._repeating
        self.current, self._repeating = current, True
        try:
            yield
        finally:
            self.current, self._repeating = before

    def parts(self, x: torch.Tensor) -> int:
        """k of x [B k, ...] for the B rows of the current pass. Raises ValueError where B does not divide len(x)."""
        rows = self._now().rows.shape[0]
        if len(x) % max(rows, 1):
            raise ValueError(f"dropout or drop-path of {list(x.shape)}, whose first dim is no multiple of {rows} rows")
        return len(x) // max(rows, 1)

    def _now(self) -> Pass:
        if self.current is None:
            raise ValueError("dropout or drop-path ran in training mode outside `with model.passes(Pass(...))`")
        return self.current

    def uniform(self, site: int, columns: int, *, of_rows: bool = True) -> torch.Tensor:
        """float32 [B, columns] in (0, 1) for the rows of the current pass; [1, columns] for all rows if not of_rows."""
        now = self._now()
        rows = now.rows if of_rows else torch.zeros(1, dtype=torch.int64, device=now.rows.device)
        return uniform(seed=now.seed, stream=now.stream * SITES + site, step=now.step, rows=rows, columns=columns)

    def per_row(self, site: int) -> torch.Tensor:
        """`uniform(site, 1)`, [B, 1]; the first site that asks draws for all of them: a pass launches Philox once."""
        now = self._now()
        if not now.drawn:
            streams = now.stream * SITES + torch.arange(self._sites, device=now.rows.device)
            now.drawn.append(uniform(seed=now.seed, stream=streams, step=now.step, rows=now.rows, columns=1))
        return now.drawn[0][site]
