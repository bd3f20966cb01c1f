"""Spatial partition: the columns of every image and every activation split over the ranks of a width group."""

from mpl_scale.spatial import whole, windows
from mpl_scale.spatial.halo import Traffic
from mpl_scale.spatial.layout import input_columns
from mpl_scale.spatial.parallelize import parallelize, plan_layout, refuse_empty_slices, traffic
from mpl_scale.spatial.rules import SplitLayer, columnwise, partition_rule
from mpl_scale.spatial.table import PartitionTable, StageRow, partition_table
from mpl_scale.spatial.verify import Differences, compare_partitioned

__all__ = [
    "Differences",
    "PartitionTable",
    "SplitLayer",
    "StageRow",
    "Traffic",
    "columnwise",
    "compare_partitioned",
    "input_columns",
    "parallelize",
    "partition_rule",
    "partition_table",
    "plan_layout",
    "refuse_empty_slices",
    "traffic",
    "whole",
    "windows",
]
