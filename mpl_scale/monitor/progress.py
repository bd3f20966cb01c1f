"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere. On one rank only."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TextIO

from tqdm import tqdm

from mpl_scale.monitor.pace import Pace, format_seconds

Mode = Literal["auto", "bar", "lines", "off"]
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"  # without tqdm's own times: its clock jumps when the host's is set


class Progress:
    """One bar, or one line per report, for each phase.

    A line reads `[train 120/1000] student_loss 1.234 h 0.012 5103 img/s eta 1m20s`.
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
            self._bar = tqdm(
                total=total, initial=done, desc=phase, bar_format=_BAR, file=self._stream, dynamic_ncols=True
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
        shown = {name: self._shown[name] for name in self._show if name in self._shown}
        self._bar.set_postfix_str(" ".join([*_words(shown), *self._speed_words()]), refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

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


def _words(values: Mapping[str, float]) -> list[str]:
    """name value, with four significant digits."""
    return [f"{name} {value:.4g}" if math.isfinite(value) else f"{name} {value}" for name, value in values.items()]
