"""The strong view with fixed shapes gives the bytes of the view grouped by operation, and never waits for the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpl_scale.augment import OP_SETS, OPS, Given, Operation, StrongView
from mpl_scale.augment.histogram import count_levels
from mpl_scale.config.schema import StrongConfig

CANDIDATES = np.arange(1000, 1500, dtype=np.int64)
COUNT = 48
IDS = np.arange(COUNT, dtype=np.int64)
EPOCHS = IDS // 30
META = torch.device("meta")


def some_images(size: tuple[int, int], count: int = COUNT) -> torch.Tensor:
    """Noise, few levels, and one colour in turn."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 3, *size))
    images[1::3] = generator.integers(0, 3, (count, 3, *size))[1::3] * 100
    images[2::6] = generator.integers(0, 256, (count, 3, 1, 1))[2::6]
    return torch.from_numpy(images.astype(np.uint8))


def strong_view(**settings: Any) -> StrongView:
    return StrongView(StrongConfig(**settings), seed=3, stream=1, candidates=CANDIDATES)


def static_views(
    view: StrongView, images: torch.Tensor, partners: torch.Tensor | None, *, part: slice = slice(None)
) -> torch.Tensor:
    assert view.static is not None
    size = (images.shape[2], images.shape[3])
    parameters = view.parameters(IDS[part], EPOCHS[part], size=size, device=images.device)
    return view.static(images[part], parameters, None if partners is None else partners[part])


def check(view: StrongView, size: tuple[int, int]) -> None:
    images = some_images(size)
    partners, before = images.roll(1, 0), images.clone()
    expected = view(images, IDS, EPOCHS, partners)
    result = static_views(view, images, partners)
    assert torch.equal(images, before), "the input was written to"
    assert torch.equal(result, expected)


SIZES = [(8, 8), (32, 32), (33, 33), (33, 20), (40, 56), (2, 5), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_each_operation_equals_its_grouped_form(name: str, size: tuple[int, int]) -> None:
    for rule, magnitude in (("distance", 10.0), ("level", 16.0), ("distance", 30.0)):
        check(strong_view(ops=[name], num_ops=1, magnitude=magnitude, magnitude_rule=rule, fill=77), size)


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        *({"op_set": name} for name in OP_SETS),
        {"op_set": "cifar10", "num_ops": 3, "magnitude": 10.0, "random_magnitude": False, "cutout": 9, "fill": 128},
        {"preset": "released_code", "flip": True, "crop_pad": 4},
        {"flip": True, "probability": 0.5, "cutout": 1 << 40},
        {"crop_pad": 100, "num_ops": 1},
        {"num_ops": 0, "cutout": 3},
        {"num_ops": 0},
    ],
    ids=str,
)
def test_each_list_of_operations_equals_its_grouped_form(settings: dict[str, Any], size: tuple[int, int]) -> None:
    check(strong_view(**settings), size)


def test_a_part_of_the_batch_takes_its_rows_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    view, images = strong_view(op_set="cifar10", cutout=5), some_images((16, 16))
    partners = images.roll(1, 0)
    whole = static_views(view, images, partners)
    parts = [static_views(view, images, partners, part=part) for part in (slice(0, 7), slice(7, 8), slice(8, COUNT))]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, static_views(view, images.to(memory_format=torch.channels_last), partners))
    monkeypatch.setattr("mpl_scale.augment.static._NUMBERS", 3 * 16 * 16 * 20)  # 20 images at once
    assert torch.equal(static_views(view, images, partners), whole)


def test_levels_are_counted_as_by_bincount() -> None:
    images = some_images((12, 9), count=6)
    counts = [[torch.bincount(channel.flatten(), minlength=256) for channel in image] for image in images]
    assert torch.equal(count_levels(images.flatten(2).long()), torch.stack([torch.stack(row) for row in counts]))


class Watch(TorchDispatchMode):
    """Counts operators, and those that a host tensor enters or leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self.on_host: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.called[func.__name__] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.on_host[func.__name__] += 1
        return result


def watched(run: Callable[[], torch.Tensor]) -> Watch:
    with Watch() as watch:
        assert run().device == META
    return watch


@pytest.mark.parametrize("settings", [{"op_set": "cifar10", "cutout": 5}, {"preset": "released_code"}], ids=str)
def test_the_view_is_a_function_of_device_tensors(settings: dict[str, Any]) -> None:
    """No host tensor enters, leaves or is made, and a value read on the host would raise: there are none on meta."""
    view, images = strong_view(**settings), torch.empty(COUNT, 3, 32, 32, dtype=torch.uint8, device=META)
    assert view.static is not None
    parameters = view.parameters(IDS, EPOCHS, size=(32, 32), device=META)
    watch = watched(lambda: view.static(images, parameters, images))  # type: ignore[misc]
    assert sum(watch.called.values()) > 50
    assert not watch.on_host


def test_a_device_gets_one_transfer_a_batch_and_the_same_operators_every_time() -> None:
    view, images = strong_view(op_set="cifar10"), torch.empty(COUNT, 3, 32, 32, dtype=torch.uint8, device=META)
    first, second = (watched(lambda epoch=epoch: view(images, IDS, EPOCHS + epoch, images)) for epoch in (0, 1))
    assert first.called == second.called
    buffer = {"empty.memory_format": 1, "detach.default": 1}  # made, and seen as an array
    assert first.on_host == Counter({**buffer, "_to_copy.default": 1})


def test_an_operation_without_a_static_form_is_grouped_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
        return images.flip(1).contiguous()

    ops = {"swap": Operation("swap", swap), "equalize": OPS["equalize"], "rotate": OPS["rotate"]}
    monkeypatch.setattr("mpl_scale.augment.registry.OPS", ops)
    view = strong_view(ops=list(ops))
    assert view.static is None
    images = torch.empty(COUNT, 3, 32, 32, dtype=torch.uint8, device=META)
    assert view(images, IDS, EPOCHS).shape == images.shape
    with pytest.raises(ValueError, match=r"\['swap'\].*without `static=`"):
        view.parameters(IDS, EPOCHS, size=(32, 32), device=META)


def test_numbers_are_drawn_once_for_partners_and_views(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpl_scale.augment import strong

    drawn: list[int] = []

    def counting(**arguments: Any) -> np.ndarray:
        drawn.append(1)
        return original(**arguments)

    original = strong.uniform_numpy
    monkeypatch.setattr(strong, "uniform_numpy", counting)
    view, images, ids = strong_view(op_set="cifar10"), some_images((8, 8)), IDS.copy()
    view.partners(ids, EPOCHS)
    before = view(images, ids, EPOCHS, images)
    assert len(drawn) == 1
    ids += 1
    assert not torch.equal(view(images, ids, EPOCHS, images), before)
    assert len(drawn) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the tests above are its CPU twins")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_gpu_gives_the_bytes_of_a_cpu(size: tuple[int, int]) -> None:
    """The CPU twin is above. Once called, once replayed from a graph with another batch's parameters."""
    device, view = torch.device("cuda"), strong_view(op_set="cifar10", cutout=5, num_ops=3)
    images = some_images(size)
    partners = images.roll(1, 0)
    assert view.static is not None
    there, others = images.to(device), partners.to(device)
    assert torch.equal(view(there, IDS, EPOCHS, others).cpu(), view(images, IDS, EPOCHS, partners))
    slots = view.parameters(IDS, EPOCHS, size=size, device=device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = view.static(there, slots, others)
    slots.copy_(view.parameters(IDS, EPOCHS + 7, size=size, device=device))
    graph.replay()
    assert torch.equal(result.cpu(), view(images, IDS, EPOCHS + 7, partners))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the tests above are its CPU twins")
@pytest.mark.parametrize("name", OPS)
def test_each_grouped_operation_gives_the_same_bytes_on_a_gpu(name: str) -> None:
    images, centres = some_images((33, 20)), np.random.default_rng(2).uniform(size=(COUNT, 2))
    amount, operation = np.random.default_rng(1).uniform(-1, 1, COUNT), OPS[name]
    if operation.amount is not None:
        amount = operation.amount(amount, StrongConfig(), (33, 20))
    there = images.to("cuda")
    result = operation(there, amount, Given(9, there.roll(1, 0), centres))
    assert torch.equal(result.cpu(), operation(images, amount, Given(9, images.roll(1, 0), centres)))
