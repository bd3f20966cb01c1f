"""metrics.jsonl: one JSON object per line, in the order of training, continued exactly where a resumed run continues.

    {"global_step": 130, "phase": "train", "step": 120, "part": "train", "wall": 1764000000.0, "student_loss": 1.25}

`part` tells what was measured: a training step (train) or an evaluation (test), whose `student_loss` is another value.
`wall` is the time, in seconds since 1970. `global_step` counts steps over all phases and never decreases; `step` counts
within the phase. JSON has no NaN and no infinity: such a value is written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpl_scale.files import replace_text

RESERVED = ("global_step", "phase", "step", "part", "wall")
"""The line's own fields."""
TRAINED = "images_per_second"
"""A metric that only lines of training have."""


def part_of(values: Mapping[str, Any]) -> str:
    """train or test: of a line, or of what is to be one. Files of former versions have no `part`."""
    return str(values.get("part", "train" if TRAINED in values else "test"))


class MetricsWriter:
    """Appends lines; each is handed to the operating system at once, so a killed run loses none."""

    def __init__(
        self, path: str | os.PathLike[str], *, resume_step: int | None, clock: Callable[[], float] = time.time
    ) -> None:
        """Open the file at path; its folder is made.

        Args:
            resume_step: global step of the checkpoint a run resumes from: later lines, which will be written again,
                and a half-written last line are dropped. None: a new run, which starts an empty file.
            clock: seconds since 1970.
        """
        self._clock = clock
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        lines = () if resume_step is None else read_metrics(self.path)
        kept = [line for line in lines if line["global_step"] <= (resume_step or 0)]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._last = kept[-1]["global_step"] if kept else None
        self._file = self.path.open("a", encoding="utf-8")

    def go_back(self, global_step: int) -> None:
        """Drop the lines after a step: they will be written again."""
        self.close()
        self._open(global_step)

    def write(self, values: Mapping[str, Any], *, phase: str, step: int, global_step: int) -> None:
        """Append one line. ValueError for a global_step before the last line's or a name of the line's own fields."""
        if self._last is not None and global_step < self._last:
            raise ValueError(
                f"{self.path}: global_step {global_step} comes after {self._last}; count steps over all phases"
            )
        if taken := [name for name in RESERVED if name in values]:
            raise ValueError(f"{self.path}: {taken} name the line's own fields; rename these metrics")
        own = {"part": part_of(values), "wall": round(self._clock(), 3)}
        line = {"global_step": global_step, "phase": phase, "step": step, **own, **values}
        self._file.write(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n")
        self._file.flush()
        self._last = global_step

    def close(self) -> None:
        """Close the file; nothing more can be written."""
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file in order; a last line that a kill left half-written is passed over.

    ValueError, with the line's number, for any other line that is not an object with a global_step. Nothing where
    there is no file.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for number, text in enumerate(lines[:-1], start=1):  # what follows the last line end is "" or a half-written line
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not _possible("global_step", line.get("global_step")):
            raise ValueError(f"{path}, line {number}: {text[:60]!r} is not a line of metrics; delete it")
        wrong = next((name for name, value in line.items() if not _possible(name, value)), None)
        if wrong is not None:
            raise ValueError(
                f"{path}, line {number}: {wrong} = {str(line[wrong])[:60]!r} is no value of it; delete the line"
            )
        yield line


def _possible(name: str, value: Any) -> bool:
    """Whether a line may hold that: words, counts, and finite numbers or null."""
    if name in ("phase", "part"):
        return isinstance(value, str)
    number = isinstance(value, int | float) and math.isfinite(value)
    return number or (value is None and name not in ("global_step", "step"))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
