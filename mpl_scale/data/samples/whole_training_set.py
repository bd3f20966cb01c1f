"""Split `all_labelled`: every training image has its label, and further images have none (3.3, section 4, Table 2).

Unlabelled images of another collection (JFT, YFCC100M) lie beside the labelled shards, in a folder named `unlabelled`;
whatever labels their files carry are never read.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.registry import ImageSet
from mpl_scale.data.samples.splits import Parts, register_split

FOLDER = "unlabelled"


@register_split("all_labelled")
def all_labelled(images: ImageSet, config: DataConfig, seed: int) -> Parts:
    """All training images labelled but those of the last `held_out_shards`; the rest: `unlabelled/` and `extra`.

    Raises:
        ValueError: a source without shards, or no shard left to train on.
    """
    if not isinstance(images, IndexedImages):
        raise ValueError(
            f"mpl_scale.data.split = 'all_labelled' counts shards, and source {config.source} has none; use cifar10, "
            "cifar100, svhn, stl10, idx, tfrecord, webdataset, parquet, arrow or arrays"
        )
    unlabelled = [
        number
        for number, shard in enumerate(images.shards)
        if shard.part == "extra" or (shard.part == "train" and FOLDER in PurePosixPath(shard.name).parts[:-1])
    ]
    apart = set(unlabelled)
    trained = [n for n, shard in enumerate(images.shards) if shard.part == "train" and n not in apart]
    kept = len(trained) - config.held_out_shards
    if kept < 1:
        raise ValueError(
            f"mpl_scale.data.held_out_shards = {config.held_out_shards} of {len(trained)} labelled training shards "
            "leaves none to train on; lower it"
        )
    return Parts(
        test=images.ids_of("test"),
        held_out=images.ids_of_shards(trained[kept:]),
        labelled=images.ids_of_shards(trained[:kept]),
        rest=images.ids_of_shards(unlabelled),
    )
