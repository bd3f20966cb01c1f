"""The index of a data set: format, reader, writer, building, subsets."""

from mpl_scale.data.index.reader import IndexedImages

__all__ = ["IndexedImages"]
