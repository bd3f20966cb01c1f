"""Views: torchvision's crops, timm's evaluation, exact parts of images, images the right way up."""

from __future__ import annotations

import contextlib
import io
import math
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from mpl_scale.config.schema import EvaluationConfig, WeakConfig
from mpl_scale.data.decode.pipeline import DecodePipeline, Decoding, Rows
from mpl_scale.data.decode.views import ATTEMPTS, View, evaluation_view, weak_view
from mpl_scale.data.encoded.header import UnreadableImage, examine
from tests.support.photographs import ImagesInMemory, encoded, photograph

SIZES = ((640, 427), (300, 400), (120, 90), (1000, 333), (223, 225))  # width, height
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def views_of(
    files: list[bytes],
    view: View,
    uniform: np.ndarray | None = None,
    *,
    channels_last: bool = False,
    dali_resizes: bool = False,
    threads: int = 1,
) -> torch.Tensor:
    """uint8 [n, 3, H, W]."""
    ids = np.arange(len(files))
    rows = Rows(ids, np.zeros((len(files), view.columns)) if uniform is None else uniform, ids)
    pipeline = DecodePipeline(
        iter([[rows]]),
        images=ImagesInMemory(files),
        view=view,
        capacity=len(files),
        device=torch.device("cpu"),
        decoding=Decoding(channels_last=channels_last, dali_resizes=dali_resizes, threads=threads),
    )
    decoded = pipeline.next()
    pipeline.close()
    assert decoded.samples.tolist() == ids.tolist()
    return decoded.views


def pixels(file: bytes) -> np.ndarray:
    """What PIL decodes, uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def torchvision_crop(
    numbers: np.ndarray, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision, its draws given: top, left, height, width."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[3 + attempt])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * numbers[3 + ATTEMPTS + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(numbers[0] * (height - h + 1)), math.floor(numbers[1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < min(ratio):
        h = max(1, round(width / min(ratio)))  # torchvision may ask for no pixel here, and fail
    elif width / height > max(ratio):
        w = max(1, round(height * max(ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (2.0, 2.5))])
def test_random_resized_crop_is_that_of_torchvision(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    config = WeakConfig(kind="random_resized_crop", scale=scale, ratio=ratio, flip=True)
    view = weak_view(config, 32)
    generator = np.random.default_rng(0)
    shapes = generator.integers(1, 500, (2000, 2))
    shapes[:200, 1] = 1 + shapes[:200, 0] // 50  # so narrow that hardly any draw fits
    uniform = generator.random((2000, view.columns))
    placed = view.place(uniform, shapes)
    fell_back = 0
    for row, (height, width) in enumerate(shapes.tolist()):
        expected = torchvision_crop(uniform[row], height, width, scale=scale, ratio=ratio)
        assert (*placed["crop_starts"][row], *placed["crop_shapes"][row]) == expected, row
        fell_back += expected[:2] == ((height - expected[2]) // 2, (width - expected[3]) // 2)
    assert fell_back > 100
    assert np.array_equal(placed["flips"], uniform[:, 2] < 0.5)


def resampling(source: int, target: int, interpolation: str) -> np.ndarray:
    """The weights of an antialiased resize along one axis, float64 [target, source]; borders are repeated outwards."""
    support, step = (1 if interpolation == "bilinear" else 2), source / target
    stretch = max(step, 1.0)
    weights = np.zeros((target, source))
    for place in range(target):
        centre = (place + 0.5) * step
        index = np.arange(math.floor(centre - support * stretch) - 1, math.ceil(centre + support * stretch) + 2)
        x = np.abs((index + 0.5 - centre) / stretch)
        if interpolation == "bilinear":
            filtered = np.maximum(0, 1 - x)
        else:  # Catmull-Rom, a = -1/2
            filtered = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
        np.add.at(weights[place], index.clip(0, source - 1), filtered / filtered.sum())
    return weights


def resized(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """The exact resize of [h, w, 3] to [*size, 3], rounded once."""
    rows, columns = (resampling(image.shape[axis], size[axis], interpolation) for axis in (0, 1))
    exact = np.einsum("oh,pw,hwc->opc", rows, columns, image.astype(np.float64), optimize=True)
    return np.clip(np.rint(exact), 0, 255)


BOUNDS = {  # largest difference from PIL, levels
    # PIL and torch round after each axis, DALI once: three errors of at most half a level.
    ("torch", "bilinear"): 1,
    ("dali", "bilinear"): 1,
    # Both clip what negative weights overshoot after each axis; torch's weights have 16 bits, PIL's 22.
    ("torch", "bicubic"): 2,
    # DALI clips at the end.
    ("dali", "bicubic"): 16,
}


@pytest.mark.parametrize(("resizer", "interpolation"), BOUNDS)
@pytest.mark.parametrize("image_size", [64, 160])
def test_center_crop_is_that_of_timm(image_size: int, resizer: str, interpolation: str) -> None:
    files = [encoded(photograph(index, *size)) for index, size in enumerate(SIZES)]
    view = evaluation_view(EvaluationConfig(kind="center_crop", interpolation=interpolation), image_size)
    ours = views_of(files, view, dali_resizes=resizer == "dali").permute(0, 2, 3, 1).numpy().astype(int)
    transform = create_transform(
        (3, image_size, image_size), interpolation=interpolation, crop_pct=0.875, use_prefetcher=True
    )
    theirs = np.stack([np.asarray(transform(Image.fromarray(pixels(file)))) for file in files]).transpose(0, 2, 3, 1)
    difference = np.abs(ours - theirs)
    assert difference.mean() < 0.25  # two roundings instead of one: uniform errors of up to half a level
    assert difference.max() <= BOUNDS[resizer, interpolation]
    assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["random_resized_crop", "shift_crop"])
def test_weak_views_are_exact(kind: str, interpolation: str) -> None:
    """Of torch against PIL, and of DALI, which repeats an image's border outwards, against exact sums."""
    files = [encoded(photograph(index, *size), "JPEG", quality=90) for index, size in enumerate(SIZES)]
    view = weak_view(WeakConfig(kind=kind, interpolation=interpolation, flip=True, pad=5, fill=7), 48)
    uniform = np.random.default_rng(1).random((len(files), view.columns))
    ours, with_dali = (
        views_of(files, view, uniform, dali_resizes=dali).permute(0, 2, 3, 1).numpy() for dali in (False, True)
    )
    shapes = np.array([pixels(file).shape[:2] for file in files])
    whole = {
        "crop_starts": np.zeros((len(files), 2), int),
        "crop_shapes": shapes,
        "windows": np.zeros((len(files), 2), int),
    }
    placed = whole | view.place(uniform, shapes)
    for row, file in enumerate(files):
        (top, left), (height, width) = placed["crop_starts"][row], placed["crop_shapes"][row]
        part = pixels(file)[top : top + height, left : left + width]
        by_pil = np.asarray(Image.fromarray(part).resize((48, 48), RESAMPLING[interpolation]))
        for actual, expected, bound in (
            (ours[row], by_pil, BOUNDS["torch", interpolation]),
            (with_dali[row], resized(part, (48, 48), interpolation), 1),  # float32 sums: the other side of a half
        ):
            down, right = placed["windows"][row] + 48
            window = np.full((144, 144, 3), 7)
            window[48:96, 48:96] = expected
            window = window[down : down + 48, right : right + 48]
            window = window[:, ::-1] if placed["flips"][row] else window
            assert np.abs(actual - window).max() <= bound


def test_threads_do_not_change_a_pixel() -> None:
    files = [encoded(photograph(index, *size)) for index, size in enumerate(SIZES)]
    view = weak_view(WeakConfig(pad=3, flip=True), 20)
    uniform = np.random.default_rng(1).random((len(files), view.columns))
    assert torch.equal(views_of(files, view, uniform), views_of(files, view, uniform, threads=3))


PARTS = {
    "4:2:0": ("RGB", "JPEG", {"quality": 90}),
    "4:2:2": ("RGB", "JPEG", {"subsampling": 1}),
    "4:4:4": ("RGB", "JPEG", {"subsampling": 0}),
    "progressive": ("RGB", "JPEG", {"progressive": True}),
    "restart markers": ("RGB", "JPEG", {"restart_marker_blocks": 3}),
    "grey JPEG": ("L", "JPEG", {}),
    "CMYK": ("CMYK", "JPEG", {}),
    "PNG": ("RGB", "PNG", {}),
    "palette": ("P", "PNG", {}),
    "grey and alpha": ("LA", "PNG", {}),
    "alpha": ("RGBA", "PNG", {}),
}


@pytest.mark.parametrize("kind", PARTS)
def test_part_of_an_image_is_that_of_the_whole(kind: str) -> None:
    """Where DALI decodes no more than the part, chroma at its edges included: bit for bit what PIL decodes."""
    mode, suffix, options = PARTS[kind]
    files = [encoded(photograph(0, 151, 117).convert(mode), suffix, **options)] * 40
    generator = np.random.default_rng(0)
    starts = generator.integers(0, (117 - 20, 151 - 20), (40, 2)).astype(np.int32)
    shapes = np.full((40, 2), 20, np.int32)
    view = View(20, 0, ("crop_starts", "crop_shapes"), lambda *_: {"crop_starts": starts, "crop_shapes": shapes})
    whole = pixels(files[0])
    for part, (top, left) in zip(views_of(files, view).permute(0, 2, 3, 1).numpy(), starts, strict=True):
        assert np.array_equal(part, whole[top : top + 20, left : left + 20])


@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("endian", ["<", ">"])
def test_images_come_the_right_way_up(suffix: str, orientation: int, endian: str) -> None:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112] = orientation
    exif[0x010E] = "a description before it"
    file = encoded(photograph(1, 90, 61), suffix, exif=exif.tobytes())
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))
    assert examine(file).sideways == (orientation > 4) == (upright.shape[:2] == (90, 61))
    view = weak_view(WeakConfig(kind="random_resized_crop", scale=(0.5, 1.0)), 20)
    uniform = np.random.default_rng(orientation).random((1, view.columns))
    ours = views_of([file], view, uniform, dali_resizes=True)[0].permute(1, 2, 0).numpy()
    placed = view.place(uniform, np.array([upright.shape[:2]]))
    (top, left), (height, width) = placed["crop_starts"][0], placed["crop_shapes"][0]
    exact = resized(upright[top : top + height, left : left + width], (20, 20), "bilinear")
    assert np.abs(ours - exact).max() <= 1  # float32 sums against float64: the other side of a half


def with_checksums(png: bytes) -> bytes:
    """Every chunk gets the checksum it should have."""
    out, position = png[:8], 8
    while position < len(png):
        stop = position + 8 + int.from_bytes(png[position : position + 4], "big")
        out += png[position:stop] + zlib.crc32(png[position + 4 : stop]).to_bytes(4, "big")
        position = stop + 4
    return out


@pytest.mark.parametrize("cut", [*range(0, 60, 7), 200])
def test_damaged_metadata_count_as_none(cut: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("JPEG", "PNG"):
        file = bytearray(encoded(photograph(1, 9, 6), suffix, exif=exif.tobytes()))
        with contextlib.suppress(UnreadableImage):
            examine(bytes(file[:cut]))
        start = file.index(b"MM\0*" if b"MM\0*" in file else b"II*\0")
        file[start + 4 : start + 12] = b"\xff" * 8
        if suffix == "PNG":
            file = with_checksums(bytes(file))
        assert not examine(bytes(file)).sideways


def test_channels_last_is_a_layout() -> None:
    files = [encoded(photograph(index, *size)) for index, size in enumerate(SIZES)]
    view = evaluation_view(EvaluationConfig(), 32)
    planes, last = views_of(files, view), views_of(files, view, channels_last=True)
    assert torch.equal(planes, last)
    assert planes.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: weak_view(WeakConfig(kind="shift_crob"), 8),
            r"mpl_scale\.data\.weak\.kind = 'shift_crob' .* shift_crop",
        ),
        (
            lambda: evaluation_view(EvaluationConfig(kind="centre_crop"), 8),
            r"mpl_scale\.data\.evaluation\.kind = 'centre_crop' .* center_crop",
        ),
        (
            lambda: weak_view(WeakConfig(kind="random_resized_crop", scale=(1.0, 0.5)), 8),
            r"scale = \[1\.0, 0\.5\] is upside down",
        ),
    ],
)
def test_wrong_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
