"""A thread on every rank that ends a run in which no step ends any more, and names the rank that all wait for.

A hang is silent: one rank stands still, the others wait for it in a collective, until its time limit kills them with a
message about themselves. Here every rank that has seen no step boundary for `seconds` writes its stacks and a line
about itself into `stacks/`; the lowest of them reads the lines and says who is behind. Then all leave with HANG_STATUS,
which a batch script or torchrun answers with a restart.

    stacks/rank00002.txt     the stack of every thread
    stacks/rank00002.json    {"rank": 2, "host": "n1", "step": 41, "collective": 1204, "call": "", "place": "...", ...}
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import mpl_scale
from mpl_scale.files import replace_text
from mpl_scale.mesh import Mesh

HANG_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
STACKS_NAME = "stacks"
_PACKAGE = os.path.dirname(mpl_scale.__file__)
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


@dataclass(frozen=True)
class Sighting:
    """Where one rank was last seen.

    collective: how many of the world's it has begun; -1 unknown. call: the collective it waits in; "" in none.
    place: the innermost line of this package. hangs: written because of a hang, not at the start.
    """

    rank: int
    host: str
    pid: int
    step: int = 0
    collective: int = -1
    call: str = ""
    place: str = ""
    hangs: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watchdog:
    """Watches this process from `beat` to `beat`; asleep before the first, and from `rest` to the next."""

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float,
        mesh: Mesh,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Args:
        folder: of the run, shared by all ranks.
        seconds: without a beat that are a hang.
        mesh: this rank's place.
        clock: seconds. end: leaves the process.
        """
        self._folder, self._seconds, self._mesh = folder / STACKS_NAME, seconds, mesh
        self._clock, self._end = clock, end
        self._main = threading.main_thread().ident
        self._deadline: float | None = None
        self._step = 0
        self._closed = threading.Event()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path(mesh.rank, "txt").unlink(missing_ok=True)
        self._write(self._sighting())
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """A step has ended, `step` of all phases."""
        self._step, self._deadline = step, self._clock() + self._seconds

    def rest(self) -> None:
        """What follows may take any time: evaluation, a checkpoint, the next phase's start."""
        self._deadline = None

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 10)):
            deadline = self._deadline
            if deadline is not None and self._clock() > deadline:
                self._report()
                return

    def _report(self) -> None:
        """Write the stacks and a sighting, name the rank that is behind, end the process."""
        try:
            own = self._sighting(hangs=True)
            with self._path(own.rank, "txt").open("w") as file:
                file.write(f"{own}: no step ended for {self._seconds:g} s, after step {own.step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._write(own)
            seen = self._gather()
            if own.rank == min(sighting.rank for sighting in seen if sighting.hangs):
                print(f"mpl-scale: error: {verdict(seen, seconds=self._seconds)}", file=sys.stderr, flush=True)
                print(f"mpl-scale: the stacks of all ranks are in {self._folder}", file=sys.stderr, flush=True)
            else:
                time.sleep(1)  # the first to leave has the launcher end the others
        finally:
            self._end(HANG_STATUS)

    def _gather(self) -> list[Sighting]:
        """The sightings of all ranks, after as long as those that hang may take to leave theirs."""
        deadline = self._clock() + min(10.0, max(2.0, self._seconds / 4))
        while True:
            seen = [s for rank in range(self._mesh.world) if (s := self._read(rank)) is not None]
            if sum(s.hangs for s in seen) == self._mesh.world or self._clock() > deadline:
                return seen
            time.sleep(0.1)

    def _sighting(self, *, hangs: bool = False) -> Sighting:
        call, place = _where(sys._current_frames().get(self._main or 0))
        return Sighting(
            rank=self._mesh.rank,
            host=os.uname().nodename,
            pid=os.getpid(),
            step=self._step,
            collective=_collectives_begun(self._mesh),
            call=call,
            place=place,
            hangs=hangs,
        )

    def _path(self, rank: int, ending: str) -> Path:
        return self._folder / f"rank{rank:05d}.{ending}"

    def _write(self, sighting: Sighting) -> None:
        replace_text(self._path(sighting.rank, "json"), json.dumps(asdict(sighting)) + "\n", durable=False)

    def _read(self, rank: int) -> Sighting | None:
        try:
            return Sighting(**json.loads(self._path(rank, "json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def verdict(seen: Sequence[Sighting], *, seconds: float) -> str:
    """Who has not arrived, where the others wait for it.

    Behind are the ranks that left no stacks (frozen, or their node is gone); else those of the lowest step; else of the
    fewest collectives begun; else those in no collective.
    """
    awake = [s for s in seen if s.hangs]
    candidates: list[list[Sighting]] = [
        [s for s in seen if not s.hangs],
        [s for s in awake if s.step == min(a.step for a in awake)],
        [s for s in awake if s.collective == min(a.collective for a in awake)],
        [s for s in awake if not s.call],
    ]
    behind = next((found for found in candidates if 0 < len(found) < len(seen)), [])
    waiting = [s for s in awake if s not in behind]
    text = f"no step ended for {seconds:g} s, the last was step {max(s.step for s in seen)}. "
    if not behind:
        advice = "; look at the network between the nodes" if seen[0].call else ""
        return text + f"No rank is behind: all are {_doing(seen[0])}{advice}"
    named = "; ".join(f"{s}, {_doing(s)}" if s.hangs else f"{s}, which gives no sign" for s in behind[:8])
    more = f" and {len(behind) - 8} more" if len(behind) > 8 else ""
    return text + f"Not arrived: {named}{more}. Waiting for it: {_ranks(waiting)}, {_doing(waiting[0])}"


def _doing(sighting: Sighting) -> str:
    number = f" (collective {sighting.collective})" if sighting.collective >= 0 else ""
    call = f"in {sighting.call}{number}" if sighting.call else "in no collective"
    return f"{call} at {sighting.place}" if sighting.place else call


def _ranks(sightings: Sequence[Sighting]) -> str:
    names = [str(s.rank) for s in sightings]
    shown = ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} more"
    return f"rank{'s' if len(names) > 1 else ''} {shown}"


def _where(frame: FrameType | None) -> tuple[str, str]:
    """The collective a stack waits in ("" for none), and its innermost line inside this package."""
    call = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(_COLLECTIVES):
            call = code.co_name  # the outermost of them is what was called
        elif code.co_filename.startswith(_PACKAGE):
            path = os.path.relpath(code.co_filename, os.path.dirname(_PACKAGE))
            return call, f"{path}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return call, ""


def _collectives_begun(mesh: Mesh) -> int:
    """Collectives of the world's group this rank has begun; torch counts them, but promises no interface."""
    try:
        return int(mesh.world_group._get_sequence_number_for_group())  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return -1
