"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere. On one rank only."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TextIO

from tqdm import tqdm

from mpl_scale.monitor.pace import Pace, format_seconds

Mode = Literal["auto", "bar", "lines", "off"]
LEAST_BAR = 12
"""Columns: where fewer are left, words stand alone."""


class Progress:
    """One bar, or one line per report, for each phase.

    A line reads `[train 120/1000] student_loss 1.234 h 0.012 5103 img/s eta 1m20s`. A bar has the speed and the losses
    first, with short names, and of the rest what the terminal has room for:
    `train 120/1000 eta 1m20s 5103 img/s student 1.23 teacher 0.98 |####      |`.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        show: Sequence[str],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            mode: LoggingConfig.progress; auto is a bar if the stream is a terminal, else lines.
            show: names of the metrics to show, in order; the others and the absent ones are passed over.
            stream: where to write; None: standard error.
            clock: seconds.
        """
        self._stream = stream or sys.stderr
        self._mode = mode if mode != "auto" else "bar" if self._stream.isatty() else "lines"
        self._show = tuple(show)
        self._clock = clock
        self._bar: tqdm | None = None

    def start(self, phase: str, *, total: int, done: int, images_per_step: int) -> None:
        """Begin a phase of `total` steps of which `done` are done; images over all ranks."""
        self.close()
        self._phase, self._images_per_step = phase, images_per_step
        self._shown: dict[str, float] = {}
        self._pace = Pace(total=total, done=done, clock=self._clock)
        if self._mode == "bar":
            columns = _columns(self._stream)
            self._bar = tqdm(
                total=total,
                initial=done,
                file=self._stream,
                ncols=columns,
                bar_format=self._bar_format(done, columns),
            )

    def report(self, values: Mapping[str, float], *, step: int) -> None:
        """Show that `step` steps of the phase are done. Metrics not in values keep their last value in a bar."""
        if self._mode == "off":
            return
        self._pace.report(step)
        new = {name: values[name] for name in self._show if name in values}
        self._shown |= new
        if self._bar is None:
            self._write(" ".join([f"[{self._phase} {step}/{self._pace.total}]", *_words(new), *self._speed_words()]))
            return
        self._bar.ncols = _columns(self._stream)
        self._bar.bar_format = self._bar_format(step, self._bar.ncols)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def _bar_format(self, step: int, columns: int) -> str:
        """What of a bar fits, for tqdm. Its own times are not in it: its clock jumps when the host's is set."""
        losses_first = sorted(self._show, key=lambda name: name.startswith("test/") or not name.endswith("loss"))
        shown = {_short(name): self._shown[name] for name in losses_first if name in self._shown}
        text = f"{self._phase} {step}/{self._pace.total}"
        for word in (*reversed(self._speed_words()), *_words(shown, digits=3)):
            if len(text) + 1 + len(word) > columns:
                break
            text += f" {word}"
        return f"{text} |{{bar}}|" if columns - len(text) >= LEAST_BAR else text

    def note(self, line: str) -> None:
        """Print a line of its own, above the bar if there is one; in every mode but off."""
        if self._mode != "off":
            self._write(line)

    def close(self) -> None:
        """End the phase's bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def _speed_words(self) -> list[str]:
        """Images per second and time left, where known."""
        words = []
        if (rate := self._pace.steps_per_second) is not None:
            words.append(f"{rate * self._images_per_step:.0f} img/s")
        if (seconds := self._pace.seconds_left) is not None:
            words.append(f"eta {format_seconds(seconds)}")
        return words


def _columns(stream: TextIO) -> int:
    """Width of the terminal, characters."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal, no descriptor
        return shutil.get_terminal_size().columns


def _short(name: str) -> str:
    """A loss by whose it is, for a bar; of the test set, only losses keep that they are."""
    return (
        name.removesuffix("_loss").removesuffix("_supervised") if name.endswith("_loss") else name.removeprefix("test/")
    )


def _words(values: Mapping[str, float], *, digits: int = 4) -> list[str]:
    """name value, with that many significant digits."""
    return [
        f"{name} {value:.{digits}g}" if math.isfinite(value) else f"{name} {value}" for name, value in values.items()
    ]
