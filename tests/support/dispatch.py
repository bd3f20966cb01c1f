"""Dispatch modes that see every operator of a step: host tensors, collectives, and a CUDA graph's stand-in for the CPU.

A mode sits below autograd, so it sees forward, backward and optimiser alike.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mpl_scale
from mpl_scale.types import StepMetrics

_PACKAGE = str(Path(mpl_scale.__file__).parent)
_HOST_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"}


def _tensors(*trees: Any) -> list[torch.Tensor]:
    """Those that have memory: forward mode's zeros have none."""
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor) and not leaf._is_zerotensor()]


class HostTensors(TorchDispatchMode):
    """Lists operators that read, make or return a tensor in host memory, with the line of this package.

    For steps on the meta device: on a GPU each would be a copy between host and device, which a graph cannot replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        if any(tensor.device.type == "cpu" for tensor in _tensors(args, kwargs, result)):
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
            where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            self.found.append(f"{func.__name__}{where}")
        return result


class HostReads(TorchDispatchMode):
    """Counts operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in _HOST_READS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Collective(NamedTuple):
    """One call. shapes: of its tensors, with their dtype. ranks: of its group. splits: rows received and sent."""

    name: str
    shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    ranks: tuple[int, ...]
    splits: tuple[tuple[int, ...], ...]


class Collectives(TorchDispatchMode):
    """Records what a rank asks of its process groups, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            shapes = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in _tensors(args))
            splits = tuple(tuple(arg) for arg in args if isinstance(arg, list) and all(type(n) is int for n in arg))
            self.calls.append(Collective(func.__name__, shapes, next(_groups(args)), splits))
        return func(*args, **(kwargs or {}))


def _groups(args: Any) -> Iterator[tuple[int, ...]]:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            yield tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg)))


class Tape(TorchDispatchMode):
    """Records operators with the very tensors they were called on, and runs them again: a CUDA graph on a CPU.

    As with a graph, Python runs once and addresses are fixed; memory that the recorded step wrote to is set back, since
    a capture executes nothing; an operator that reads a device value on the host ends it.

    fail_at: number of the operator that raises `error` in place of running; -1: none.
    """

    def __init__(self, *, fail_at: int = -1, error: Exception | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.operators = 0
        self._fail_at, self._error = fail_at, error or RuntimeError("operation not permitted when stream is capturing")
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.operators == self._fail_at or func.__name__.split(".")[0] in _HOST_READS:
            raise self._error
        self.operators += 1
        arguments = func._schema.arguments
        given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
        written = _tensors([value for argument, value in given if argument.alias_info and argument.alias_info.is_write])
        if func.namespace == "c10d":  # their schemas do not say what they write to
            written = _tensors(args)
        for storage in (tensor.untyped_storage() for tensor in written):
            if storage.data_ptr() not in self._made:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        is_view = any(output.alias_info is not None for output in func._schema.returns) and not written
        if not is_view and not self._ends_reduce_scatter(func, args):
            self.calls.append((func, args, kwargs, result))
            self._made.update({t.untyped_storage().data_ptr() for t in _tensors(result)} - self._before.keys())
        return result

    def _ends_reduce_scatter(self, func: Any, args: Any) -> bool:
        """Whether it is gloo's own copy, in `wait`, of the reduced values from a buffer that each call makes anew."""
        last, given, *_ = self.calls[-1] if self.calls else (None, None)
        is_copy = func is torch.ops.aten.copy_.default and last is torch.ops.c10d._reduce_scatter_base_.default
        return is_copy and args[0].data_ptr() == given[0].data_ptr()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for storage, values in self._before.values():
            storage.copy_(values)
        self._before.clear()

    def replay(self) -> None:
        """Run the recorded operators, each on the tensors of the recording."""
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, recorded in self.calls:
                result = func(*args, **kwargs)
                if func.namespace == "c10d":
                    dist.Work.unbox(
                        next(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.ScriptObject))
                    ).wait()
                for old, new in zip(_tensors(recorded), _tensors(result), strict=True):
                    # An empty one may be a shell that was given another tensor's memory since.
                    if new.numel() and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class CpuGraphs:
    """mpl_scale.engine.graph.Graphs on a CPU.

    Attributes:
        recorded: operators of each recording.
        released: how often memory was given back.
    """

    def __init__(self, *, fail_at: int = -1, error: Exception | None = None) -> None:
        self._fail_at, self._error = fail_at, error
        self.recorded: list[int] = []
        self.released = 0

    def warm_up(self, step: Callable[[], StepMetrics]) -> StepMetrics:
        return step()

    def record(self, step: Callable[[], StepMetrics]) -> tuple[Callable[[], None], StepMetrics]:
        tape = Tape(fail_at=self._fail_at, error=self._error)
        with tape:
            metrics = step()
        self.recorded.append(tape.operators)
        return tape.replay, metrics

    def release(self) -> None:
        self.released += 1
