"""The command line `mpl-scale` (train, plan, check, index, sweep, report and more), and train.py for launchers."""

from mpl_scale.cli.main import main

__all__ = ["main"]
