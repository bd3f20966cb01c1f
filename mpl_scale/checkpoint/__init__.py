"""Checkpoints that survive kills, say what is wrong with them, and load on another number of ranks."""

from mpl_scale.checkpoint.background import BackgroundSave
from mpl_scale.checkpoint.entries import Entry, network_entries, replicated_entries, shard_entries
from mpl_scale.checkpoint.folders import find
from mpl_scale.checkpoint.format import CheckpointError, DamagedCheckpoint, Index, WriteFailed
from mpl_scale.checkpoint.gather import gather_parameters
from mpl_scale.checkpoint.reader import load, newest_good, read_prefix
from mpl_scale.checkpoint.writer import save

__all__ = [
    "BackgroundSave",
    "CheckpointError",
    "DamagedCheckpoint",
    "Entry",
    "Index",
    "WriteFailed",
    "find",
    "gather_parameters",
    "load",
    "network_entries",
    "newest_good",
    "read_prefix",
    "replicated_entries",
    "save",
    "shard_entries",
]
