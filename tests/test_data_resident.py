"""Resident images: the batches of the path from files, bit for bit, without a file read or decoded at run time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpl_scale.augment import StrongView
from mpl_scale.config import load_config
from mpl_scale.config.schema import DataConfig, EvaluationConfig, StrongConfig, WeakConfig
from mpl_scale.data import ImageFormat, Quarantine, Splits, evaluation_batches, load_images, make_splits
from mpl_scale.data.decode.pipeline import DecodePipeline
from mpl_scale.data.evaluation import EvaluationBatch
from mpl_scale.data.prefetch import Prefetcher
from mpl_scale.data.registry import ImageFiles
from mpl_scale.data.resident_parts import ResidentParts, decide
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.trainer.preflight import check_names, load_splits
from mpl_scale.trainer.prepare import Options, train
from mpl_scale.types import Batch
from tests.support import mini_imagenet as mini
from tests.support.bad_files import BAD
from tests.support.batches import data_rank as mesh
from tests.support.batches import take, train_loader
from tests.support.configs import tiny, write
from tests.support.photographs import ImagesInMemory, encoded, photograph
from tests.support.ranks import pool
from tests.support.tiers import full

CPU = torch.device("cpu")
WEAK = WeakConfig(pad=2, fill=7, flip=True)
SOURCES: dict[str, Callable[[Path], object]] = {
    "digits": lambda root: None,
    "cifar10": mini.write_cifar_binary,
    "cifar100": mini.write_cifar100,
    "stl10": mini.write_stl10,
    "arrays": mini.write_arrays,
    "idx": mini.write_idx,
    "folder": mini.write_folder,
}
"""What writes each source's files."""


def parts_of(config: DataConfig, splits: Splits, size: int, **options: Any) -> ResidentParts:
    kept = config.model_copy(update={"resident": "on"})
    quarantine = options.pop("quarantine", None) or Quarantine(max_fraction=config.max_bad_fraction)
    return ResidentParts(kept, splits, image_size=size, device=CPU, quarantine=quarantine, **options)


def batches(
    config: DataConfig, splits: Splits, size: int, steps: int, *, parts: ResidentParts | None, **changes: Any
) -> list[Batch]:
    """Without `parts`: from files."""
    strong = StrongView(config.strong, seed=3, stream=1, candidates=splits.unlabelled)
    options: dict[str, Any] = {
        "image_size": size,
        "labelled": 6,
        "unlabelled": 10,
        "seed": 3,
        "strong_view": strong,
        "quarantine": Quarantine(max_fraction=1.0),
        "resident": None if parts is None else parts.train,
    }
    place = changes.pop("mesh", mesh())
    return take(train_loader(config, splits, place, **(options | changes)), steps)


def evaluated(
    config: DataConfig, splits: Splits, size: int, *, parts: ResidentParts | None, place: Mesh, **changes: Any
) -> list[EvaluationBatch]:
    quarantine = changes.pop("quarantine", Quarantine(max_fraction=1.0))
    images, resident = ImageFormat(image_size=size, **changes), None if parts is None else parts.test
    return list(evaluation_batches(config, splits, images=images, mesh=place, quarantine=quarantine, resident=resident))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    for step, (expected, actual) in enumerate(zip(one, other, strict=True)):
        assert expected.tensors().keys() == actual.tensors().keys()
        for name, value in expected.tensors().items():
            assert torch.equal(value, getattr(actual, name)), (step, name)
            assert value.dtype == getattr(actual, name).dtype
        inputs = expected.normalise(expected.strong), actual.normalise(actual.strong)
        assert torch.equal(*inputs)
        assert inputs[0].stride() == inputs[1].stride()


def assert_evaluated_the_same(one: list[EvaluationBatch], other: list[EvaluationBatch]) -> None:
    for expected, actual in zip(one, other, strict=True):
        assert all(torch.equal(*pair) for pair in zip(expected, actual, strict=True))


@pytest.fixture(params=SOURCES, scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Splits]:
    root = tmp_path_factory.mktemp(request.param)
    SOURCES[request.param](root / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPL_SCALE_DATA", str(root / "cache"))
        config = DataConfig(
            source=request.param,
            root=str(root / "files"),
            weak=WEAK,
            strong=StrongConfig(op_set="imagenet", cutout=3),
            evaluation_batch=7,
        )
        images = load_images(config)
    ids = np.setdiff1d(np.arange(len(images)), images.refused)
    return config, Splits(images, test=ids[::4], labelled=ids[1::4], unlabelled=ids[np.arange(len(ids)) % 4 > 0])


@pytest.mark.parametrize("size", [full(8), 11])
def test_every_batch_is_that_of_the_path_from_files(data: tuple[DataConfig, Splits], size: int) -> None:
    """Sample pairing's partners included, on 1 and 2 ranks and from any step on; size 11 is resized to."""
    config, splits = data
    parts = parts_of(config, splits, size)
    whole = batches(config, splits, size, 40, parts=None)
    assert any(not torch.equal(batch.strong, batch.weak) for batch in whole)
    assert_same(whole, batches(config, splits, size, 40, parts=parts))
    assert_same(whole[23:], batches(config, splits, size, 17, parts=parts, start_step=23))
    for index in range(2):
        place = mesh(2, index)
        files = batches(config, splits, size, 9, parts=None, mesh=place)
        assert_same(files, batches(config, splits, size, 9, parts=parts, mesh=place))


@pytest.mark.parametrize("kind", ["resize", "center_crop"])
def test_every_test_image_is_that_of_the_path_from_files(data: tuple[DataConfig, Splits], kind: str) -> None:
    config, splits = data
    config = config.model_copy(update={"evaluation": EvaluationConfig(kind=kind)})
    parts = parts_of(config, splits, 10)
    for place in (mesh(), mesh(2, 0), mesh(2, 1)):
        files = evaluated(config, splits, 10, parts=None, place=place)
        assert_evaluated_the_same(files, evaluated(config, splits, 10, parts=parts, place=place))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Splits]:
    root = str(tmp_path_factory.mktemp("data") / "digits")
    config = DataConfig(root=root, weak=WEAK, strong=StrongConfig(cutout=3), evaluation_batch=100)
    return config, make_splits(load_images(config), config=config, seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"strong_view": None},
        {"unlabelled": 0},
        {"unlabelled": 0, "strong_view": None},
        {"channels_last": True},
        {"labelled": 2000, "unlabelled": 3000},
        {"labelled_view": "strong"},
        {"distributions": "distributions.npy"},
        {"weak": WeakConfig()},
        {"weak": WeakConfig(pad=20, fill=200)},
    ],
    ids=str,
)
def test_settings(digits: tuple[DataConfig, Splits], tmp_path: Path, changes: dict[str, Any]) -> None:
    config, splits = digits
    if "distributions" in changes:
        path = tmp_path / "distributions.npy"
        np.save(path, np.random.default_rng(0).dirichlet([0.3] * 10, 1797).astype(np.float16))
        changes = {"distributions": str(path)}
    update = {name: value for name, value in changes.items() if name in DataConfig.model_fields}
    options = {name: value for name, value in changes.items() if name not in update}
    config = config.model_copy(update=update)
    steps = 2 if changes.get("labelled") == 2000 else 5  # more than the list holds
    files = batches(config, splits, 8, steps, parts=None, **options)
    assert_same(files, batches(config, splits, 8, steps, parts=parts_of(config, splits, 8), **options))


def spoilt() -> tuple[ImagesInMemory, Splits]:
    """Every second kind of bad file twice over, in all three lists, and neighbours among them."""
    files = [encoded(photograph(index, 40 + index % 7, 50 - index % 11), "JPEG") for index in range(120)]
    kinds = list(BAD)[::2]
    for number, kind in enumerate(kinds * 2):
        files[5 * number % 119 + number % 2] = BAD[kind][0]()
    images = ImagesInMemory(files)
    ids = np.arange(120)
    return images, Splits(images, test=ids[2::3], labelled=ids[::3], unlabelled=np.union1d(ids[1::3], ids[::6]))


def test_bad_files_are_replaced_by_the_same_ones_and_named_at_the_start(tmp_path: Path) -> None:
    _, splits = spoilt()
    config = DataConfig(weak=WEAK, evaluation_batch=7)
    told: list[str] = []
    found = Quarantine(max_fraction=1.0, path=tmp_path / "bad.jsonl", warn=told.append)
    parts, in_files = parts_of(config, splits, 16, quarantine=found), Quarantine(max_fraction=1.0)
    files = batches(config, splits, 16, 40, parts=None, quarantine=in_files)
    assert_same(files, batches(config, splits, 16, 40, parts=parts))
    for place in (mesh(2, 0), mesh(2, 1)):
        files = batches(config, splits, 16, 5, parts=None, mesh=place)
        assert_same(files, batches(config, splits, 16, 5, parts=parts, mesh=place))
    shown = evaluated(config, splits, 16, parts=None, place=mesh(), quarantine=in_files)
    assert_evaluated_the_same(shown, evaluated(config, splits, 16, parts=parts, place=mesh()))
    assert not all(batch.valid.all() for batch in shown)
    assert found.bad == in_files.bad  # 40 steps show every image
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["sample"]: line["reason"] for line in lines} == found.bad
    assert len(lines) == len(told) > 10


def test_too_many_bad_files_end_the_run_with_the_same_count() -> None:
    """The share is of the images drawn, as on the path from files: decoding them all counts for nothing."""
    _, splits = spoilt()
    config, counts = DataConfig(weak=WEAK, max_bad_fraction=0.05), []
    for resident in (False, True):
        quarantine = Quarantine(max_fraction=0.05)
        parts = parts_of(config, splits, 16, quarantine=quarantine) if resident else None
        with pytest.raises(ValueError, match=r"max_bad_fraction = 0\.05; \d+ unreadable image") as caught:
            batches(config, splits, 16, 40, parts=parts, quarantine=quarantine)
        counts.append(str(caught.value).split(", more than")[0])
    assert counts[0] == counts[1]


def test_a_list_without_good_images_is_named() -> None:
    images = ImagesInMemory([encoded(photograph(index, 20, 20)) for index in range(30)])
    for sample in range(0, 30, 3):
        images.files[sample] = BAD["cut.jpg"][0]()
    ids = np.arange(30)
    splits = Splits(images, test=ids[2::3], labelled=ids[::3], unlabelled=ids[1::3])
    for resident in (False, True):
        config = DataConfig(weak=WEAK)
        parts = parts_of(config, splits, 16) if resident else None
        with pytest.raises(
            ValueError, match=r"10 images in a row cannot be read or decoded, of a list of 10: 10 unread"
        ):
            batches(config, splits, 16, 1, parts=parts)


def test_nothing_is_read_or_decoded_at_run_time(
    digits: tuple[DataConfig, Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, splits = digits
    reads: list[int] = []
    read = ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda images, sample: reads.append(sample) or read(images, sample))
    parts = parts_of(config, splits, 8, unlabelled=False)
    assert parts.train is not None
    assert sorted(reads) == splits.labelled.tolist()
    reads.clear()
    parts = parts_of(config, splits, 8)
    assert parts.train is parts.train
    assert parts.test is not None
    assert sorted(reads) == sorted([*np.union1d(splits.labelled, splits.unlabelled), *splits.test])
    reads.clear()
    monkeypatch.setattr(DecodePipeline, "__init__", None)
    batches(config, splits, 8, 20, parts=parts)
    evaluated(config, splits, 8, parts=parts, place=mesh())
    assert not reads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; every test above is its CPU twin")
def test_a_gpu_makes_the_batches_of_a_cpu(digits: tuple[DataConfig, Splits]) -> None:
    """Of the same stored bytes: a GPU's decoder resizes otherwise. On a stream of their own, many steps planned."""
    config, splits = digits
    device = torch.device("cuda", 0)
    kept = parts_of(config, splits, 8).train
    assert kept is not None
    loaders = [
        train_loader(
            config,
            splits,
            dataclasses.replace(mesh(), device=images.pixels.device),
            labelled=100,
            unlabelled=700,
            seed=3,
            strong_view=StrongView(config.strong, seed=3, stream=1),
            resident=images,
        )
        for images in (kept, dataclasses.replace(kept, pixels=kept.pixels.to(device)))
    ]
    cpu, gpu = Prefetcher(loaders[0], CPU), Prefetcher(loaders[1], device)
    for _ in range(20):
        expected, actual = next(cpu), next(gpu)
        for name, value in expected.tensors().items():
            assert torch.equal(value, getattr(actual, name).cpu()), name


def compare_columns(config: DataConfig, splits: Splits) -> None:
    """On a rank of a width group: its columns of all images are those of the path from files."""
    place, columns = build_mesh(device=CPU, width=2), [(0, 5), (5, 8)]
    parts = parts_of(config, splits, 8)
    options: dict[str, Any] = {"mesh": place, "columns": columns, "labelled": 5, "unlabelled": 7}
    files = batches(config, splits, 8, 6, parts=None, **options)
    assert files[0].weak.shape == (7, 3, 8, 5 - 2 * place.width_index)
    assert_same(files, batches(config, splits, 8, 6, parts=parts, **options))
    shown = evaluated(config, splits, 8, parts=None, place=place, columns=columns)
    assert_evaluated_the_same(shown, evaluated(config, splits, 8, parts=parts, place=place, columns=columns))


def test_ranks_of_a_width_group_exchange_the_same_columns(digits: tuple[DataConfig, Splits]) -> None:
    config = digits[0].model_copy(update={"strong": StrongConfig(op_set="imagenet", cutout=3)})
    pool(2).run(compare_columns, config, digits[1])


def sized(*sizes: tuple[int, int]) -> Splits:
    images = ImagesInMemory([b""] * len(sizes))
    images.sizes = np.array(sizes, np.int32)
    ids = np.arange(len(sizes))
    return Splits(images, test=ids[:1], labelled=ids[1:2], unlabelled=ids[1:])


def test_auto_keeps_small_images_of_one_size_that_fit() -> None:
    same = sized(*[(32, 32)] * 4)
    config = DataConfig(weak=WeakConfig(pad=2))
    assert decide(config, same, 32)
    assert not decide(config.model_copy(update={"resident": "off"}), same, 32)
    assert not decide(config.model_copy(update={"weak": WeakConfig(kind="random_resized_crop")}), same, 32)
    assert not decide(config, sized((32, 32), (32, 32), (32, 31)), 32)
    assert not decide(config, sized(*[(97, 97)] * 4), 32)
    assert not decide(config, sized(*[(0, 0)] * 4), 32)  # nobody knows
    exactly = 3 * 3 * 34**2 + (2 * 34 + 2) + 3 * 32**2  # three images with margins and a guard, one without
    assert decide(config.model_copy(update={"resident_bytes": exactly}), same, 32)
    assert not decide(config.model_copy(update={"resident_bytes": exactly - 1}), same, 32)


def test_on_keeps_images_of_any_size_or_says_why_not() -> None:
    config = DataConfig(resident="on")
    assert decide(config, sized((97, 50), (20, 30)), 32)
    with pytest.raises(
        ValueError, match=r"resident = on: the decoded images take 6144 bytes .*resident_bytes = 6143; r"
    ):
        decide(config.model_copy(update={"resident_bytes": 6143}), sized((32, 32), (32, 32)), 32)
    crop = config.model_copy(update={"weak": WeakConfig(kind="random_resized_crop")})
    with pytest.raises(
        ValueError, match=r"resident = on with mpl_scale.data.weak.kind = random_resized_crop: .* set weak"
    ):
        decide(crop, sized((32, 32), (32, 32)), 32)


def is_over(values: Iterator[int]) -> bool:
    return next(values, None) is None


def test_a_run_learns_the_same_from_resident_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All phases and their evaluations, stopped in the middle and resumed; auto keeps the digits."""
    lines, reads = {}, []
    read = ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda images, sample: reads.append(sample) or read(images, sample))
    for resident in ("off", "auto"):
        raw = tiny()
        raw["mpl_scale"]["parallel"] = {"engine": "flat"}
        raw["mpl_scale"]["data"] = raw["mpl_scale"].get("data", {}) | {"resident": resident}
        run, output = load_config(write(tmp_path, raw, f"{resident}.json")), tmp_path / resident
        reads.clear()
        if resident == "auto":
            asked = iter(range(6))  # says no six times, then yes
            assert train(run, Options(output), stop_requested=partial(is_over, asked)) is None
        assert train(run, Options(output)) is not None
        if resident == "auto":
            assert max(reads.count(sample) for sample in set(reads)) <= 2  # once in each of the two processes
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        timed = ("wall", "images_per_second", "data_wait_share", "seconds")
        lines[resident] = [{key: value for key, value in row.items() if key not in timed} for row in rows]
    assert lines["off"] == lines["auto"]


def test_refusals_come_before_the_run(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["data"] = raw["mpl_scale"].get("data", {}) | {"resident": "on", "resident_bytes": 1000}
    with pytest.raises(ValueError, match=r"more than mpl_scale.data.resident_bytes = 1000; raise it"):
        load_splits(load_config(write(tmp_path, raw)))
    raw["mpl_scale"]["data"]["weak"] = {"kind": "random_resized_crop"}
    with pytest.raises(ValueError, match=r"resident = on with mpl_scale.data.weak.kind = random_resized_crop"):
        check_names(load_config(write(tmp_path, raw)))
