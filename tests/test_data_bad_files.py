"""Bad files while training: counted, replaced by the next good image, and nothing else changes, on any ranks."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mpl_scale.config.schema import DataConfig, WeakConfig
from mpl_scale.data import ImageFormat, Splits, TrainLoader, evaluation_batches
from mpl_scale.data.decode.pipeline import DecodePipeline, Decoding, Rows
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.decode.views import View, weak_view
from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.mesh import Mesh
from mpl_scale.types import Batch
from tests.support.bad_files import BAD, GOOD, NO_FILE
from tests.support.batches import data_rank as mesh
from tests.support.batches import take, train_loader
from tests.support.photographs import ImagesInMemory, encoded, photograph

CPU = torch.device("cpu")
SHIFT = WeakConfig(pad=2, flip=True)
CROP = WeakConfig(kind="random_resized_crop", interpolation="bicubic", flip=True)
KINDS = [*BAD, *NO_FILE]


class Folder(ImagesInMemory):
    """An ImageSet of files, which may go bad after they were listed."""

    def __init__(self, paths: Sequence[Path], labels: np.ndarray | None = None) -> None:
        super().__init__([b""] * len(paths))
        self.paths = list(paths)
        self.labels = self.labels if labels is None else labels

    def read(self, sample: int) -> np.ndarray:
        try:
            descriptor = os.open(self.paths[sample], os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb", buffering=0) as file:
                content = file.read()
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror}") from error
        return np.frombuffer(content, np.uint8)

    def name(self, sample: int) -> str:
        return str(self.paths[sample])


def splits_of(images: ImagesInMemory) -> Splits:
    """A third labelled, a third unlabelled, a third held out; every list holds kinds of all sorts."""
    ids = np.arange(len(images))
    return Splits(images, test=ids[2::3], labelled=ids[::3], unlabelled=ids[1::3])


def loader_of(
    images: ImagesInMemory,
    weak: WeakConfig,
    *,
    place: Mesh | None = None,
    start: int = 0,
    max_bad_fraction: float = 1.0,
    quarantine: Quarantine | None = None,
) -> TrainLoader:
    config = DataConfig(weak=weak, max_bad_fraction=max_bad_fraction)
    changes = {"image_size": 16, "stream": 0, "start_step": start, "quarantine": quarantine}
    return train_loader(config, splits_of(images), place or mesh(), **changes)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(value, getattr(other, name)) for name, value in one.tensors().items())


def good_file(index: int) -> bytes:
    return encoded(photograph(index, 40 + index % 7, 50 - index % 11), "JPEG", quality=70 + index % 20)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Folder, set[str]]:
    """Three files of every bad kind, among as many good ones; the same folder with the substitutes in their places.

    Three, one for each list of the splits. Two bad files of a list follow each other now and then.
    """
    root = tmp_path_factory.mktemp("spoilt")
    order = np.random.default_rng(0).permutation(2 * len(KINDS)).tolist()  # of groups of three: bad or good
    paths, bad = [], []
    for place, group in enumerate(order):
        for member in range(3):
            sample = 3 * place + member
            if group < len(KINDS):
                path = root / f"{sample:03d}" / KINDS[group]
                path.parent.mkdir()
                if path.name in NO_FILE:
                    NO_FILE[path.name](path)
                else:
                    path.write_bytes(BAD[path.name][0]())
                bad.append(sample)
            else:
                path = root / f"{sample:03d}.jpg"
                path.write_bytes(good_file(sample))
            paths.append(path)
    images = Folder(paths)
    splits = splits_of(images)
    stand_in = np.arange(len(paths))
    for ids in (splits.labelled, splits.unlabelled, splits.test):
        for position, sample in enumerate(ids):
            after = (ids[(position + step) % len(ids)] for step in range(len(ids)))
            stand_in[sample] = next(other for other in after if other not in bad)
    mended = Folder([paths[other] for other in stand_in], labels=stand_in)
    return images, mended, {str(paths[sample]) for sample in bad}


@pytest.mark.parametrize("weak", [SHIFT, CROP], ids=lambda weak: weak.kind)
def test_a_run_over_every_kind_of_bad_file(
    spoilt: tuple[Folder, Folder, set[str]], tmp_path: Path, weak: WeakConfig
) -> None:
    """The batches are those of a folder that holds the substitutes; a file bad in parts counts where it is seen."""
    images, mended, bad = spoilt
    assert len({Path(name).name for name in bad}) == len(KINDS) >= 25
    told: list[str] = []
    quarantine = Quarantine(max_fraction=1.0, path=tmp_path / "quarantine.jsonl", warn=told.append)
    taken = take(loader_of(images, weak, quarantine=quarantine), 40)
    in_parts = {name for name in bad if name.endswith("cut_after_thumbnail.jpg")}
    for batch, expected in zip(taken, take(loader_of(mended, weak), 40), strict=True):
        if weak is SHIFT:
            assert same(batch, expected)
        else:
            for name in ("labelled", "weak"):
                rows = (getattr(batch, name) == getattr(expected, name)).flatten(1).all(1)
                assert (~rows).sum() <= 2  # parts of a file that is bad elsewhere
    test = set(map(images.name, splits_of(images).test.tolist()))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    found = {line["name"]: line["reason"] for line in lines}
    assert len(found) == len(lines) == len(told) == quarantine.count  # each once
    assert bad - test - in_parts <= found.keys() <= bad - test  # 40 steps are three epochs
    for name, reason in found.items():
        expected_reason = BAD.get(Path(name).name, (None, "cannot be read"))[1]
        assert expected_reason in reason or Path(name).name == "pipe.jpg"
        assert images.name(next(line["sample"] for line in lines if line["name"] == name)) == name


@pytest.mark.parametrize("weak", [SHIFT, CROP], ids=lambda weak: weak.kind)
def test_resumed_and_on_other_ranks_the_same_substitutes_are_taken(
    spoilt: tuple[Folder, Folder, set[str]], weak: WeakConfig
) -> None:
    """What an earlier step, or another rank, has met does not matter: badness is the file's, or the part's."""
    images = spoilt[0]
    whole = take(loader_of(images, weak), 16)
    for expected, batch in zip(whole[9:], take(loader_of(images, weak, start=9), 7), strict=True):
        assert same(expected, batch)
    parts = [take(loader_of(images, weak, place=mesh(2, index), start=9), 7) for index in range(2)]
    for expected, *pair in zip(whole[9:], *parts, strict=True):
        for name in ("labelled", "labels", "weak"):
            assert torch.equal(getattr(expected, name), torch.cat([getattr(part, name) for part in pair]))


@pytest.mark.parametrize("kind", GOOD)
def test_unusual_files_are_decoded(kind: str) -> None:
    """As PIL decodes them, but the right way up, and 16 bits scaled to 8 instead of clipped."""
    content = GOOD[kind]()
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    expected = np.asarray(image.convert("RGB"))
    if kind == "sixteen_bits.png":
        expected = np.repeat(np.asarray(photograph(0, 120, 90).convert("L"))[..., None], 3, axis=2)
    side = min(expected.shape[:2])
    part = {"crop_starts": np.zeros((1, 2), np.int32), "crop_shapes": np.full((1, 2), side, np.int32)}
    ids = np.arange(1)
    for view in (View(side, 0, tuple(part), lambda *_: part), weak_view(WeakConfig(), 8)):
        quarantine = Quarantine()
        pipeline = DecodePipeline(
            iter([[Rows(ids, np.full((1, view.columns), 0.5), ids)]]),
            images=ImagesInMemory([content]),
            view=view,
            capacity=1,
            device=CPU,
            quarantine=quarantine,
        )
        views = pipeline.next().views[0].permute(1, 2, 0).numpy()
        pipeline.close()
        assert quarantine.count == 0
        if view.steps == tuple(part):
            assert np.array_equal(views, expected[:side, :side])


def spoil(images: ImagesInMemory, ids: Sequence[int], kind: str = "flipped_bit.png") -> ImagesInMemory:
    for sample in ids:
        images.files[sample] = BAD[kind][0]()
    return images


def test_too_many_bad_images_stop_the_run() -> None:
    """Ten different ones, above the fraction; it names the first, and says what to do."""
    few = spoil(ImagesInMemory([good_file(index) for index in range(90)]), range(9))
    assert len(take(loader_of(few, SHIFT, max_bad_fraction=0.01), 20)) == 20
    many = spoil(ImagesInMemory([good_file(index) for index in range(90)]), range(30))
    assert len(take(loader_of(many, SHIFT, max_bad_fraction=0.5), 20)) == 20
    loader = loader_of(many, SHIFT, max_bad_fraction=0.01)
    message = (
        r"\d+ of the \d+ images drawn so far were bad, more than mpl_scale\.data\.max_bad_fraction = 0\.01; "
        r"\d+ unreadable image\(s\), delete or replace each: image \d+: a PNG chunk .* with a wrong checksum; .* more"
    )
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(loader, 20))
    loader.close()


def test_a_list_without_good_images_is_named() -> None:
    loader = loader_of(spoil(ImagesInMemory([good_file(0)] * 30), range(0, 30, 3), "cut.jpg"), SHIFT)
    with pytest.raises(ValueError, match=r"10 images in a row cannot be read or decoded, of a list of 10: 10 unread"):
        next(loader)
    loader.close()


def test_a_list_of_images_that_are_bad_in_parts_is_named() -> None:
    """All four decode at the top; of their lower part, which the view shows, none does."""
    files = [BAD["cut_after_thumbnail.jpg"][0]()] * 4
    part = {"crop_starts": np.array([[70, 0]], np.int32), "crop_shapes": np.full((1, 2), 16, np.int32)}
    ids = np.arange(4)
    pipeline = DecodePipeline(
        iter([[Rows(ids[:1], np.zeros((1, 0)), ids)]]),
        images=ImagesInMemory(files),
        view=View(16, 0, tuple(part), lambda *_: part),
        capacity=1,
        device=CPU,
    )
    with pytest.raises(ValueError, match=r"of a list of 4: 4 unreadable .*: image 0: DALI cannot .*; image 3: DALI"):
        pipeline.next()
    pipeline.close()


def test_a_restarted_run_lists_no_file_twice(tmp_path: Path) -> None:
    path, told = tmp_path / "out" / "quarantine.jsonl", []
    for bad in ((3, 7), (3, 7, 13)):
        images = spoil(ImagesInMemory([good_file(index) for index in range(30)]), bad)
        quarantine = Quarantine(max_fraction=1.0, path=path, warn=told.append)
        take(loader_of(images, SHIFT, quarantine=quarantine), 6)
        assert quarantine.count == len(bad)
        path.write_text(path.read_text() + '{"name": "cut by a ki')
    first, second, cut, third, _ = path.read_text().splitlines()
    assert [json.loads(line)["sample"] for line in sorted([first, second, third])] == [13, 3, 7]
    assert cut == '{"name": "cut by a ki'
    assert len(told) == 3


def test_bombs_are_not_unpacked() -> None:
    images = ImagesInMemory([encoded(photograph(0, 200, 100)), encoded(photograph(1, 100, 100))])
    quarantine = Quarantine()
    pipeline = DecodePipeline(
        iter([[Rows(np.arange(2), np.zeros((2, 3)), np.arange(2))]]),
        images=images,
        view=weak_view(WeakConfig(), 8),
        capacity=2,
        device=CPU,
        quarantine=quarantine,
        decoding=Decoding(max_pixels=10_000),
    )
    assert pipeline.next().samples.tolist() == [1, 1]
    assert quarantine.bad == {
        0: "100 x 200 pixels are more than mpl_scale.data.max_pixels = 10000, which may be raised"
    }


def test_evaluation_counts_readable_images_only() -> None:
    images = spoil(ImagesInMemory([good_file(index) for index in range(30)]), (2, 11))
    splits = splits_of(images)
    quarantine = Quarantine(max_fraction=1.0)
    config = DataConfig(evaluation_batch=3)
    found = evaluation_batches(config, splits, images=ImageFormat(image_size=8), mesh=mesh(), quarantine=quarantine)
    labels = [int(label) for batch in found for label in batch.labels[batch.valid]]
    assert labels == sorted(set(splits.test.tolist()) - {2, 11})
    assert quarantine.bad.keys() == {2, 11}


def test_errors_that_are_no_image_s_are_passed_on() -> None:
    """A view that asks DALI for the impossible of a good image must not empty the data set."""
    view = View(8, 0, ("sizes",), lambda *_: {"sizes": np.full((1, 3), 8, np.float32)})  # three sides
    quarantine = Quarantine()
    pipeline = DecodePipeline(
        iter([[Rows(np.arange(1), np.zeros((1, 0)), np.arange(1))]]),
        images=ImagesInMemory([good_file(0)]),
        view=view,
        capacity=1,
        device=CPU,
        quarantine=quarantine,
        decoding=Decoding(dali_resizes=True),
    )
    with pytest.raises(RuntimeError):
        pipeline.next()
    assert quarantine.count == 0
