"""Which parts of a data set stay decoded in memory (`mpl_scale.data.resident`), and when they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.decode.views import View, evaluation_view, weak_view
from mpl_scale.data.registry import ImageSet
from mpl_scale.data.resident import ResidentImages, stored_bytes, stored_view
from mpl_scale.data.samples.splits import Splits
from mpl_scale.data.vectors import VectorSet, resident_vectors

SMALL = 96
"""Pixels of a side: `auto` keeps images up to this size (those of STL-10)."""
_COUNTED_TWICE = 1 << 22  # images: more than anybody keeps, and sorting them takes seconds


def refuse_view(config: DataConfig, image_size: int) -> None:
    """ValueError where resident = on and the weak view cannot be made of resident images."""
    if config.resident == "on" and stored_view(weak_view(config.weak, image_size)) is None:
        raise ValueError(
            f"mpl_scale.data.resident = on with mpl_scale.data.weak.kind = {config.weak.kind}: it resizes another part "
            "of an image in every epoch, which the decoder does from the file and a resident copy cannot repeat bit "
            "for bit; set weak.kind = shift_crop, or resident = auto"
        )


def decide(config: DataConfig, splits: Splits, image_size: int) -> bool:
    """Whether the images of these splits stay decoded.

    auto: the weak view allows it, all images have one size of at most SMALL pixels, and they take no more than
    `resident_bytes`.

    Raises:
        ValueError: resident = on, and the view or the number of bytes forbids it.
    """
    refuse_view(config, image_size)
    weak, evaluation = weak_view(config.weak, image_size), evaluation_view(config.evaluation, image_size)
    if config.resident == "off" or stored_view(weak) is None:
        return False
    channels = config.decoded_channels
    needed = stored_bytes(weak, _most(splits), channels=channels)
    needed += stored_bytes(evaluation, len(splits.test), channels=channels)
    if config.resident == "on" and needed > config.resident_bytes:
        raise ValueError(
            f"mpl_scale.data.resident = on: the decoded images take {needed} bytes on every rank, more than "
            f"mpl_scale.data.resident_bytes = {config.resident_bytes}; raise it, or set resident = auto"
        )
    lists = (splits.labelled, splits.unlabelled, splits.test)
    return needed <= config.resident_bytes and (config.resident == "on" or _all_small(splits.images, lists))


def _most(splits: Splits) -> int:
    """Training images; labelled ones that are among the unlabelled count once, unless there are millions."""
    labelled, unlabelled = splits.labelled, splits.unlabelled
    if len(labelled) + len(unlabelled) > _COUNTED_TWICE:
        return len(labelled) + len(unlabelled)
    return len(np.union1d(labelled, unlabelled))


def _all_small(images: ImageSet, lists: Sequence[np.ndarray]) -> bool:
    sizes = [images.sizes[ids] for ids in lists if len(ids)]
    first = sizes[0][0]
    return 0 < first.max() <= SMALL and all(bool((some == first).all()) for some in sizes)


class ResidentParts:
    """The resident images of a run, or its vectors: each part is decoded when it is first asked for, and kept."""

    def __init__(
        self,
        config: DataConfig,
        splits: Splits,
        *,
        image_size: int,
        device: torch.device,
        quarantine: Quarantine,
        unlabelled: bool = True,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Args:
        config: the data section.
        splits: the parts.
        image_size: height and width of the views, pixels.
        device: where the images are kept.
        quarantine: where bad images are kept.
        unlabelled: whether unlabelled images are needed.
        tell: told of each part that is decoded.

        Raises:
            ValueError: as `decide`.
        """
        self._config, self._splits, self._image_size, self._device = config, splits, image_size, device
        self._quarantine, self.unlabelled, self._tell = quarantine, unlabelled, tell
        self._vectors = None
        if isinstance(splits.images, VectorSet):
            self._vectors = resident_vectors(splits.images, device)
        self._resident = self._vectors is None and decide(config, splits, image_size)

    @cached_property
    def train(self) -> ResidentImages | None:
        """The labelled images and, where they are needed, the unlabelled ones; None: they are read from files."""
        splits = self._splits
        lists = [splits.labelled, splits.unlabelled] if self.unlabelled else [splits.labelled]
        return self._decoded("training", lists, weak_view(self._config.weak, self._image_size))

    @cached_property
    def test(self) -> ResidentImages | None:
        """The images of the evaluation; None: they are read from files."""
        view = evaluation_view(self._config.evaluation, self._image_size)
        return self._decoded("test", [self._splits.test], view)

    def _decoded(self, part: str, lists: list[np.ndarray], view: View) -> ResidentImages | None:
        if not self._resident:
            return self._vectors
        found = ResidentImages.decode(
            self._splits.images,
            lists,
            view=view,
            config=self._config,
            device=self._device,
            quarantine=self._quarantine,
        )
        if self._tell is not None:
            self._tell(
                f"{len(found.ids)} {part} images stay decoded in memory, {found.pixels.nbytes / 1e6:.1f} MB on every "
                "rank (mpl_scale.data.resident)"
            )
        return found
