"""Source `digits`: scikit-learn's 1,797 handwritten digits, 8x8 pixels, as real PNG files.

The UCI "Optical Recognition of Handwritten Digits" test set ships inside scikit-learn, so the quick start and the
tests run the whole pipeline (files, headers, DALI) without a download.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from mpl_scale.data.formats.folder import read_folder
from mpl_scale.data.registry import ImageFiles, data_folder, register_source
from mpl_scale.packages import require_packages

COUNT = 1797
GREY_LEVELS = 16  # the data set's values run from 0 to 16


@register_source("digits")
def read_digits(root: Path | None) -> ImageFiles:
    """The digits; their files are written to `root` the first time.

    Args:
        root: the folder; None: $MPL_SCALE_DATA/digits, or ~/.cache/mpl_scale/digits.

    Raises:
        ValueError: scikit-learn is needed and missing, or the folder cannot be written, or holds something else.
    """
    root = root or data_folder() / "digits"
    if not root.is_dir() or not any(root.iterdir()):
        try:
            _write(root)
        except OSError as error:
            raise ValueError(
                f"the digits cannot be written to '{root}': {error.strerror}; set MPL_SCALE_DATA, or "
                "mpl_scale.data.root, to a folder with room"
            ) from error
    images = read_folder(root)
    if len(images) != COUNT or len(images.classes) != 10:
        raise ValueError(
            f"mpl_scale.data.root = '{root}' holds {len(images)} images in {len(images.classes)} classes, not the "
            f"{COUNT} digits; delete it (it will be written again) or name another folder"
        )
    return images


def _write(root: Path) -> None:
    """Write all files beside `root`, then rename: a kill leaves no half-written set, and the first of several wins."""
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write_files(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            temporary.rename(root)
        except OSError:
            if not any(root.iterdir()):
                raise  # not another process that was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(folder: Path) -> None:
    require_packages([("mpl_scale.data.source = 'digits', whose files scikit-learn has,", "sklearn")])
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8) * 255 / GREY_LEVELS).astype(np.uint8)
    for label in range(10):
        (folder / str(label)).mkdir()
    for index, (image, label) in enumerate(zip(grey, labels, strict=True)):
        Image.fromarray(image).save(folder / str(label) / f"{index:04d}.png")
