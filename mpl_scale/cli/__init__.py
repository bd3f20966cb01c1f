"""The command line: `mpl-scale train | check | split | index`, and train.py for the launchers."""

from mpl_scale.cli.main import main

__all__ = ["main"]
