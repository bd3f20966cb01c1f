"""Images as batches: sources, splits, stateless sample order, DALI decoding (DESIGN 7)."""

from mpl_scale.data import digits, folder
from mpl_scale.data.evaluation import EvaluationBatch, evaluation_batches
from mpl_scale.data.loader import StrongViewFunction, TrainLoader, check_batches
from mpl_scale.data.registry import SOURCES, ImageFiles, ImageSet, load_images, register_source
from mpl_scale.data.splits import Splits, make_splits

__all__ = [
    "SOURCES",
    "EvaluationBatch",
    "ImageFiles",
    "ImageSet",
    "Splits",
    "StrongViewFunction",
    "TrainLoader",
    "check_batches",
    "digits",
    "evaluation_batches",
    "folder",
    "load_images",
    "make_splits",
    "register_source",
]
