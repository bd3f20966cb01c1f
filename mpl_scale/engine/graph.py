"""The whole step as one CUDA graph: static input slots, warm-up, capture, replay.

The step is a function of a state that lives in place and of a batch; it reads no device value on the host
(tests/test_capture_safety.py). So a batch is copied into fixed slots and the captured step replayed: one launch for
student update, feedback and teacher update, with ZeRO's collectives inside. On a CPU, and during warm-up, the same
runner calls the same function on the same slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpl_scale.mpl.methods import Step
from mpl_scale.mpl.state import State
from mpl_scale.types import Batch, StepMetrics

WARMUP_STEPS = 3
"""Real training steps run eagerly before the capture: they make communicators, autotuned kernels and buffers."""


class StepRunner:
    """Calls a step on static slots, or replays it.

    Args:
        step: of a registered method.
        state: what it trains, at fixed addresses.
        capture: replay a CUDA graph once warm; False: always call the step.
        fall_back: told, in one line, why a capture failed before the run goes on eagerly; None: the failure is raised.

    Raises:
        ValueError: a batch whose shapes or dtypes differ from the first one's, by name.
    """

    def __init__(
        self, step: Step, state: State, *, capture: bool, fall_back: Callable[[str], None] | None = None
    ) -> None:
        self.step, self._state, self._capture, self._fall_back = step, state, capture, fall_back
        self._slots: Batch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._metrics: StepMetrics = {}
        self._calls = 0

    def __call__(self, batch: Batch) -> StepMetrics:
        """Run one step. A replay returns the same tensors each time, with new values."""
        slots = self._fill(batch)
        self._calls += 1
        if not self._capture:
            return self.step(self._state, slots)
        if self._calls <= WARMUP_STEPS:
            return self._warm_up(slots)
        if self._graph is None:
            try:
                self._graph = self._captured(slots)
            except RuntimeError as error:
                if self._fall_back is None:
                    raise
                self._capture = False
                self._fall_back(f"the step could not be captured as a CUDA graph and runs eagerly: {error}")
                return self.step(self._state, slots)
        self._graph.replay()
        return self._metrics

    def _captured(self, slots: Batch) -> torch.cuda.CUDAGraph:
        """Record the step; nothing is computed, so the state is as it was."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._metrics = self.step(self._state, slots)
        return graph

    def _warm_up(self, slots: Batch) -> StepMetrics:
        """On a side stream, as a capture runs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            metrics = self.step(self._state, slots)
        torch.cuda.current_stream().wait_stream(stream)
        return metrics

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
