"""Notes what a pass does on the meta device: work by kind of layer, collectives, bytes that stay alive."""

from __future__ import annotations

import enum
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.kernels import IDENTITY, Loops, activation_of, loops

KINDS = ("dense", "pointwise", "depthwise", "linear", "norm", "elementwise")
"""Layer classes: convolutions by what they mix, matrix products, batch norm as compiled loops, everything else."""
_SCAN_EVERY = 16
_TYPICAL_IMAGES = 16
"""The number of images for which the worst moment is determined."""
_FREE = ("empty", "new_empty", "detach", "alias", "lift", "_unsafe_view", "view", "set_", "record_stream")
_aten = torch.ops.aten


class Direction(enum.Enum):
    """The direction of the pass that runs now."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Line:
    """A quantity that grows with the images: fixed + per_image * images."""

    fixed: float = 0.0
    per_image: float = 0.0

    def at(self, images: float) -> float:
        """Bytes for a number of images."""
        return self.fixed + self.per_image * images

    def per(self, batch: int) -> Line:
        """The line of one image, from what a whole batch took."""
        return Line(self.fixed, self.per_image / batch)

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.per_image + other.per_image)

    def __sub__(self, other: Line) -> Line:
        return Line(self.fixed - other.fixed, self.per_image - other.per_image)


@dataclass(frozen=True)
class Work:
    """Operators of one kind and alike in multiply-accumulates per byte. calls: kernels launched."""

    kind: str
    macs: Line
    bytes: Line
    calls: int


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind over a group (world, width). bytes: what the rank gives into all of them together."""

    group: str
    operation: str
    bytes: Line
    calls: int


class _Done:
    """The handle of a collective that nobody has to wait for."""

    def wait(self, *_: object) -> bool:
        return True


class MeteredGroup:
    """Stands for a process group on the meta device: counts what is sent, and answers at once."""

    def __init__(self, name: str, recorder: Recorder | None = None) -> None:
        self._name, self.recorder = name, recorder

    def allreduce(self, tensors: list[torch.Tensor], options: object = None) -> _Done:
        """Record an all-reduce; the interface of torch's ProcessGroup."""
        self._note("all_reduce", tensors)
        return _Done()

    def alltoall_base(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_counts: list[int],
        sent_counts: list[int],
        options: object = None,
    ) -> _Done:
        """Record an all-to-all; the interface of torch's ProcessGroup."""
        self._note("all_to_all", [sent])
        return _Done()

    all_to_all_single = alltoall_base  # its name from torch 2.15 on

    def _note(self, operation: str, tensors: list[torch.Tensor]) -> None:
        if self.recorder is not None:
            self.recorder.note_sent(self._name, operation, tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> MeteredGroup:
        return self  # a copy of a model asks the same group


class Recorder(TorchDispatchMode):
    """See the module. `direction` and `stage` are set from outside; unit: the prime that divides what images own."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit
        self.direction, self.stage = Direction.FORWARD, ""
        self.peak = Line()
        self._alive: dict[int, tuple[StorageWeakRef, Line, str]] = {}
        self._ignored: set[int] = set()
        self._keep: list[torch.Tensor] = []
        self._work: dict[tuple[Direction, str, int], list[Any]] = defaultdict(lambda: [Line(), Line(), 0])
        self._sent: dict[tuple[Direction, str, str], list[Any]] = defaultdict(lambda: [Line(), 0])
        self._quiet = False
        self._operators = 0
        self._results: dict[tuple[Any, ...], Any] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """These were there before, or do not count."""
        for tensor in tensors:
            self._keep.append(tensor)
            key = tensor.untyped_storage()._cdata
            self._ignored.add(key)
            self._alive.pop(key, None)

    def line(self, amount: float, elements: int) -> Line:
        """An amount that belongs to images if their prime divides the elements."""
        return Line(0.0, amount) if elements and elements % self.unit == 0 else Line(amount, 0.0)

    def size(self, tensors: Iterable[torch.Tensor]) -> Line:
        """Bytes of tensors; what is expanded counts its storage."""
        total = Line()
        for tensor in tensors:
            storage = tensor.untyped_storage().nbytes()
            total += self.line(min(tensor.numel() * tensor.element_size(), storage), storage // tensor.element_size())
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, note its work and what it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._alive.get(key)
            if key not in self._ignored and (known is None or known[0].expired()):
                size = self.line(storage.nbytes(), storage.nbytes() // tensor.element_size())
                self._alive[key] = (StorageWeakRef(storage), size, self.stage)
        if not self._quiet:
            self._note_work(func, args, kwargs, outputs)
        self._operators += not self._quiet
        if not self._quiet and self._operators % _SCAN_EVERY == 0:
            self._scan()
        return result

    def _note_work(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
        name = func._schema.name.split("::")[1]
        if name.startswith(_FREE):
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        held = {tensor.untyped_storage()._cdata for tensor in inputs}
        if not func._schema.is_mutable and all(out.untyped_storage()._cdata in held for out in outputs):
            return  # a view
        kind, macs = self._arithmetic(func, args, outputs)
        self.note(kind, macs, self.size([*inputs, *outputs]))

    def note(self, kind: str, macs: Line, size: Line) -> None:
        """Record one kernel: multiply-accumulates and bytes moved."""
        operations, traffic = macs.at(_TYPICAL_IMAGES), size.at(_TYPICAL_IMAGES)
        bucket = round(2 * math.log2(operations / traffic)) if operations and traffic else -99
        entry = self._work[self.direction, kind, bucket]
        entry[0], entry[1], entry[2] = entry[0] + macs, entry[1] + size, entry[2] + 1

    def _arithmetic(self, func: Any, args: Any, outputs: list[torch.Tensor]) -> tuple[str, Line]:
        """The kind of an operator and its multiply-accumulates."""
        if func is _aten.convolution.default:
            return _kind(args[1], args[8]), self._macs(outputs[0], args[1])
        if func is _aten.convolution_backward.default:
            passes = sum(args[10][:2])  # of input and weight: as many as a forward each
            one = self._macs(args[0], args[2])
            return _kind(args[2], args[9]), Line(one.fixed * passes, one.per_image * passes)
        if func in (_aten.mm.default, _aten.addmm.default, _aten.bmm.default):
            left = args[1] if func is _aten.addmm.default else args[0]
            macs = outputs[0].numel() * left.shape[-1]
            return "linear", self.line(macs, macs)
        return "elementwise", Line()

    def _macs(self, output: torch.Tensor, weight: torch.Tensor) -> Line:
        return self.line(output.numel() * (weight.numel() // weight.shape[0]), output.numel())

    def note_sent(self, group: str, operation: str, tensors: list[torch.Tensor]) -> None:
        """Record one collective and the bytes of its tensors."""
        entry = self._sent[self.direction, group, operation]
        total = Line()
        for tensor in tensors:
            total += self.line(tensor.numel() * tensor.element_size(), tensor.numel())
        entry[0], entry[1] = entry[0] + total, entry[1] + 1

    def one_kernel(self, loop: Callable[..., Any]) -> Callable[..., Any]:
        """The function, noted as one pass over what it reads and returns instead of by its operators."""

        def counted(*args: Any) -> Any:
            key = (id(loop), *((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in args))
            if key in self._results:  # layers of one shape are many
                result = tree_map_only(torch.Tensor, torch.empty_like, self._results[key])
            else:
                before, self._quiet = self._quiet, True
                try:
                    result = self._results[key] = loop(*args)
                finally:
                    self._quiet = before
                self.ignore(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
                result = tree_map_only(torch.Tensor, torch.empty_like, result)
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            self.note("norm", Line(), self.size(tensors))
            return result

        return counted

    def live(self) -> dict[str, Line]:
        """Bytes that are alive now, by the stage that made them."""
        found: dict[str, Line] = {}
        for ref, size, stage in self._alive.values():
            if not ref.expired():
                found[stage] = found.get(stage, Line()) + size
        return found

    def _scan(self) -> None:
        fixed = per_image = 0.0
        for key, (ref, size, _) in list(self._alive.items()):
            if ref.expired():
                del self._alive[key]
            else:
                fixed, per_image = fixed + size.fixed, per_image + size.per_image
        now = Line(fixed, per_image)
        if now.at(_TYPICAL_IMAGES) > self.peak.at(_TYPICAL_IMAGES):
            self.peak = now

    def work(self, direction: Direction, batch: int) -> tuple[Work, ...]:
        """What was recorded, per image of a batch."""
        return tuple(
            Work(kind, macs.per(batch), size.per(batch), calls)
            for (way, kind, _), (macs, size, calls) in sorted(self._work.items(), key=lambda item: item[0][1:])
            if way is direction
        )

    def sent(self, direction: Direction, batch: int) -> tuple[Sent, ...]:
        """The running estimate of working bytes."""
        return tuple(
            Sent(group, operation, size.per(batch), calls)
            for (way, group, operation), (size, calls) in self._sent.items()
            if way is direction
        )


def _kind(weight: torch.Tensor, groups: int) -> str:
    if groups > 1 and weight.shape[1] == 1:
        return "depthwise"
    return "pointwise" if weight.shape[2:].numel() == 1 else "dense"


def metered_batch_norm(model: nn.Module, recorder: Recorder) -> None:
    """Compiled batch norms of `model` run the same loops as torch operators and note one kernel for each."""
    for layer in model.modules():
        if isinstance(layer, BatchNorm) and not layer.frozen:
            layer.forward = partial(_forward, layer, recorder)  # type: ignore[method-assign]


def _forward(layer: BatchNorm, recorder: Recorder, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm.forward in training, compiled; to ask it for its loops would load the compiler, for seconds."""
    drops = layer.drop is not None and not isinstance(layer.drop, nn.Identity)
    fused = None if drops else activation_of(layer.act)
    same = loops("eager", fused or IDENTITY, x.dtype)
    noted = {name: recorder.one_kernel(loop) for name, loop in vars(same).items() if name != "activation"}
    x = layer._normalise(x, Loops(same.activation, **noted))
    if fused is not None:
        return x
    x = x if layer.drop is None else layer.drop(x)
    return x if layer.act is None else layer.act(x)
