"""Images as batches: sources, splits, stateless sample order, DALI decoding (DESIGN 7)."""

from mpl_scale.data.batch_spec import BatchSpec, ImageFormat, StrongViewFunction
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.evaluation import EvaluationBatch, evaluation_batches
from mpl_scale.data.formats import (
    arrays,
    arrow,
    cifar,
    digits,
    folder,
    idx,
    parquet,
    stl10,
    svhn,
    table,
    tfrecord,
    webdataset,
)
from mpl_scale.data.joined import load_data, load_images
from mpl_scale.data.loader import TrainLoader, check_batches
from mpl_scale.data.registry import SOURCES, ImageFiles, ImageSet, register_source
from mpl_scale.data.samples import whole_training_set
from mpl_scale.data.samples.manifest import write_manifest
from mpl_scale.data.samples.splits import Splits, make_splits

__all__ = [
    "SOURCES",
    "BatchSpec",
    "EvaluationBatch",
    "ImageFiles",
    "ImageFormat",
    "ImageSet",
    "Quarantine",
    "Splits",
    "StrongViewFunction",
    "TrainLoader",
    "arrays",
    "arrow",
    "check_batches",
    "cifar",
    "digits",
    "evaluation_batches",
    "folder",
    "idx",
    "load_data",
    "load_images",
    "make_splits",
    "parquet",
    "register_source",
    "stl10",
    "svhn",
    "table",
    "tfrecord",
    "webdataset",
    "whole_training_set",
    "write_manifest",
]
