"""The whole step as one CUDA graph: static input slots, warm-up, capture, replay.

The step is a function of a state that lives in place and of a batch; it reads no device value on the host
(tests/test_capture_safety.py) and takes no tensor from it (tests/test_meta_step.py). So a batch is copied into fixed
slots and the captured step replayed: one launch for student update, feedback and teacher update, with ZeRO's
collectives inside. During warm-up the same function is called on the same slots; where nothing is captured, on the
batch itself.

A capture executes nothing. One that fails leaves the state as it was, and all ranks run eagerly from there: a
collective that one rank has in a graph and another calls is not something NCCL promises to match.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist

from mpl_scale.mpl.methods import Step
from mpl_scale.mpl.state import State
from mpl_scale.types import Batch, StepMetrics

WARMUP_STEPS = 3
"""Real training steps run eagerly before the capture: they make communicators, autotuned kernels and buffers."""


class Graphs(Protocol):
    """What records a step and replays it; tests have one for the CPU."""

    def warm_up(self, step: Callable[[], StepMetrics]) -> StepMetrics:
        """Run a step as a capture would."""

    def record(self, step: Callable[[], StepMetrics]) -> tuple[Callable[[], None], StepMetrics]:
        """Record a step without executing it: what replays it, and the metrics that a replay fills.

        Raises:
            RuntimeError: it cannot be recorded; nothing has changed.
        """

    def release(self) -> None:
        """Give the memory of recordings that are gone back to the device."""


class CudaGraphs:
    """CUDA graphs on the current device."""

    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []
    """Kept for good: torch's allocators may hold a pointer to one whose capture failed."""

    def warm_up(self, step: Callable[[], StepMetrics]) -> StepMetrics:
        """Run a step on a side stream, as a capture does."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            metrics = step()
        torch.cuda.current_stream().wait_stream(stream)
        return metrics

    def record(self, step: Callable[[], StepMetrics]) -> tuple[Callable[[], None], StepMetrics]:
        """See Graphs.

        thread_local: what other threads call (DALI's, NCCL's) cannot end the capture, nor fail because of it. With the
        default, `global`, one allocation by DALI ends the process.
        """
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        device = torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        random_state = generator.clone_state()
        try:
            # A failed capture_end leaves the capture's stream the current one: the outer context sets it back.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                _nothing_collected(),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                metrics = step()
        except BaseException:
            self._failed.append(graph)  # what follows torch does not undo itself where the capture was invalidated
            generator.graphsafe_set_state(random_state)
            _end_pool(device, pool)
            raise
        return graph.replay, metrics

    def release(self) -> None:
        """Free what the allocator holds of captured graphs' memory pools."""
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage collection: a destructor that frees device memory in the capturing thread ends the capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_pool(device: int, pool: tuple[int, int]) -> None:
    """Have the allocator forget a capture, unless capture_end got as far as that."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it did: the graph owns the pool
        return
    torch._C._cuda_releasePool(device, pool)


class StepRunner:
    """Calls a step, or replays it on static slots.

    Args:
        step: of a registered method.
        state: what it trains, at fixed addresses.
        capture: replay a graph once warm; False: always call the step.
        fall_back: told on every rank, in one line, why a capture failed before the run goes on eagerly; None: that is
            raised.
        settle: called before the capture; returns once nothing but this thread works for the run.
        graphs: records and replays; None: CUDA graphs.

    Attributes:
        out_of_memory: whether a capture failed for lack of memory.

    Raises:
        ValueError: a batch whose shapes or dtypes differ from the first one's, by name; a capture that failed.
    """

    def __init__(
        self,
        step: Step,
        state: State,
        *,
        capture: bool,
        fall_back: Callable[[str], None] | None = None,
        settle: Callable[[], None] = lambda: None,
        graphs: Graphs | None = None,
    ) -> None:
        self.step, self._state, self._capture, self._fall_back = step, state, capture, fall_back
        self._settle, self._graphs = settle, graphs or CudaGraphs()
        self._slots: Batch | None = None
        self._replay: Callable[[], None] | None = None
        self._metrics: StepMetrics = {}
        self._calls = 0
        self.out_of_memory = False

    def __call__(self, batch: Batch) -> StepMetrics:
        """Run one step. A replay returns the same tensors each time, with new values."""
        if not self._capture:
            return self.step(self._state, batch)
        run = partial(self.step, self._state, self._fill(batch))
        self._calls += 1
        if self._calls <= WARMUP_STEPS:
            return self._graphs.warm_up(run)
        if self._replay is None:
            self._record(run)
        if self._replay is None:
            return run()
        self._replay()
        return self._metrics

    @property
    def replays(self) -> bool:
        """Whether the next step is a replay."""
        return self._replay is not None

    def close(self) -> None:
        """Free the graph and the slots, before the next phase captures; no further call."""
        self._replay, self._slots, self._metrics = None, None, {}
        if self._capture:
            self._graphs.release()

    def _record(self, run: Callable[[], StepMetrics]) -> None:
        """Capture on all ranks, or on none."""
        self._settle()
        failure: BaseException | None = None
        try:
            self._replay, self._metrics = self._graphs.record(run)
        except RuntimeError as error:
            failure = _first(error).with_traceback(None)  # its frames hold what the step had computed
        why, self.out_of_memory = self._agreed(failure)
        if why is None:
            return
        self._replay, self._metrics = None, {}
        self._graphs.release()
        if self._fall_back is None:
            raise ValueError(f"the step could not be captured as a CUDA graph: {why}") from failure
        self._capture = False
        self._fall_back(f"the step could not be captured as a CUDA graph and runs eagerly: {why}")

    def _agreed(self, failure: BaseException | None) -> tuple[str | None, bool]:
        """Why the capture failed on any rank, None where it failed on none; and whether for lack of memory."""
        own = (None, False) if failure is None else (first_line(failure), isinstance(failure, torch.OutOfMemoryError))
        group = self._state.world_group
        if group is None:
            return own
        found = [own] * dist.get_world_size(group)
        dist.all_gather_object(found, own, group=group)
        return next(
            ((f"rank {rank}: {why}", full) for rank, (why, full) in enumerate(found) if why is not None), (None, False)
        )

    def _fill(self, batch: Batch) -> Batch:
        """Copy a batch into the slots, which the first batch shapes."""
        values = batch.tensors()
        if self._slots is None:
            self._slots = batch.with_tensors({name: value.clone() for name, value in values.items()})
            return self._slots
        slots = self._slots.tensors()
        for name, value in values.items():
            slot = slots[name]
            if (value.shape, value.dtype, value.device) != (slot.shape, slot.dtype, slot.device):
                raise ValueError(
                    f"batch.{name} is {value.dtype} {list(value.shape)} on {value.device}, the step was started with "
                    f"{slot.dtype} {list(slot.shape)} on {slot.device}; every batch of a phase must be alike"
                )
        for name, value in values.items():
            slots[name].copy_(value, non_blocking=True)
        return self._slots


def _first(error: BaseException) -> BaseException:
    """What went wrong first: ending a capture that a step has broken raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def why_not_captured(
    *, graph: str, device: torch.device, flat_engine: bool, recompute_backend: str = "native"
) -> str | None:
    """The reason why a step is called and not replayed; None: it can be captured.

    Args:
        graph: mpl_scale.parallel.graph.
        device: the mesh's.
        flat_engine: whether the flat engine shards the networks.
        recompute_backend: mpl_scale.parallel.recompute_backend.

    Raises:
        ValueError: graph = required, and it cannot be.
    """
    if graph == "off":
        return "mpl_scale.parallel.graph = off"
    reason = None
    if device.type != "cuda":
        reason = f"the run computes on {device.type}"
    elif not flat_engine:
        reason = "engine deepspeed reads the device on the host; engine flat does not"
    elif recompute_backend != "native":
        reason = f"recompute_backend {recompute_backend} reads the device's random state; native does not"
    if graph == "required" and reason is not None:
        raise ValueError(f"mpl_scale.parallel.graph = required, but {reason}; set auto, or change that")
    return reason
