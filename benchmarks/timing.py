"""Time on a CPU or a GPU: marks, phases of a step seen from outside, and configurations that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from mpl_scale.mpl import State

PHASES = ("input", "teacher_forward", "student_update", "feedback", "teacher_update", "optimiser", "other")


class Clock:
    """Marks in a device's stream (CUDA events: no synchronisation until they are read), or the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """The time now: seconds on a CPU, a recorded event on a GPU."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two marks."""
        return begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin

    def together(self) -> None:
        """Wait until all ranks are here and the device is idle."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()


class PhaseTimer:
    """Where the time of an eager step goes, by wrapping the two networks of a state; the step is not touched.

    A student's pass before its update belongs to student_update, after it to feedback; a teacher's pass before the
    student's first belongs to teacher_forward, after it, and every backward, to teacher_update; `apply` is the
    optimiser (with its gather). What lies between the calls (losses, dot products, moving averages) is `other`.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._marks: list[tuple[str, Any]] = []
        self._student_ran = self._student_applied = False

    @contextmanager
    def attached(self, state: State) -> Iterator[None]:
        """Time this state's networks; at the end the state is as it was."""
        before = state.teacher, state.student
        state.teacher = None if state.teacher is None else _Timed(state.teacher, self, "teacher")
        state.student = None if state.student is None else _Timed(state.student, self, "student")
        try:
            yield
        finally:
            state.teacher, state.student = before

    def begin(self) -> None:
        """A step begins, with the wait for its batch."""
        self._student_ran = self._student_applied = False
        self.mark("begin")

    def mark(self, phase: str) -> None:
        """Everything since the last mark was `phase`."""
        self._marks.append((phase, self._clock.mark()))

    @contextmanager
    def call(self, role: str, method: str) -> Iterator[None]:
        """Time one call of a method of the teacher or the student."""
        self.mark("other")
        yield
        self.mark(self._phase(role, method))

    def _phase(self, role: str, method: str) -> str:
        if method == "apply":
            self._student_applied |= role == "student"
            return "optimiser"
        if role == "teacher":
            return "teacher_update" if self._student_ran or method in ("accumulate", "reduce") else "teacher_forward"
        self._student_ran = True
        return "feedback" if self._student_applied else "student_update"

    def milliseconds(self) -> dict[str, float]:
        """Median over the steps since the last call, by phase, and their whole."""
        self._clock.together()
        steps: list[dict[str, float]] = []
        last = None
        for phase, mark in self._marks:
            if phase == "begin":
                steps.append(dict.fromkeys(PHASES, 0.0))
            else:
                steps[-1][phase] += 1e3 * self._clock.seconds(last, mark)
            last = mark
        self._marks.clear()
        found = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
        return found | {"step": statistics.median(sum(step.values()) for step in steps)}


class _Timed:
    """A network whose METHODS are timed; everything else is its own."""

    METHODS = ("forward", "accumulate", "reduce", "apply", "discard")

    def __init__(self, network: Any, timer: PhaseTimer, role: str) -> None:
        self._network, self._timer, self._role = network, timer, role

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._network, name)
        if name not in self.METHODS:
            return own

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timer.call(self._role, name):
                return own(*args, **kwargs)

        return timed


def interleave(
    steps: Mapping[str, Callable[[], Any]], *, rounds: int, count: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per step of each configuration in each round: A B A B ..., so that drift of the machine cancels.

    Args:
        steps: warmed up.
        rounds: how often each has its turn.
        count: steps of a turn.
        device: what to wait for.
    """
    clock = Clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            clock.together()
            began = time.perf_counter()
            for _ in range(count):
                step()
            clock.together()
            seconds[name].append((time.perf_counter() - began) / count)
    return seconds


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each configuration against the first, taken within rounds: median, least and largest of time over time."""
    base = next(iter(seconds))
    result = {}
    for name, own in seconds.items():
        found = sorted(a / b for a, b in zip(own, seconds[base], strict=True))
        result[name] = {"median": statistics.median(found), "min": found[0], "max": found[-1]}
    return result
