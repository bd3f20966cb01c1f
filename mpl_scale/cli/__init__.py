"""The command line `mpl-scale` (train, check, split, index, select, inspect, export), and train.py for launchers."""

from mpl_scale.cli.main import main

__all__ = ["main"]
