"""Runs and benchmark results as one HTML page: tables, curves and the paper's figures, with PNGs beside it."""

from mpl_scale.report.build import write_report

__all__ = ["write_report"]
