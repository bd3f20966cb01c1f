"""Packages that only some settings and commands need: checked before the ranks join, and named with pip's command."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A module that may be missing.

    module: as imported. name: for people. wheel: pip's name. extra: of this package that brings it along, if any.
    """

    module: str
    name: str
    wheel: str
    extra: str | None = None

    def installed(self) -> bool:
        """Whether Python finds it. A folder of its name, as wandb makes one for its runs, is no module."""
        try:
            spec = importlib.util.find_spec(self.module)
        except (ModuleNotFoundError, ValueError):  # its parent package is missing, or a stub without a spec
            return False
        return spec is not None and spec.origin is not None

    def missing(self) -> str:
        """The message where the package is not installed."""
        extra = "" if self.extra is None else f", or pip install 'mpl-scale[{self.extra}]'"
        return f"{self.name} is not installed: make install, or pip install {self.wheel}{extra}"


PACKAGES = {
    package.module: package
    for package in (
        Package("comet_ml", "comet_ml", "'comet_ml>=3.41.0'", "monitors"),
        Package("deepspeed", "deepspeed", "deepspeed"),
        Package("fairscale", "fairscale", "--no-build-isolation fairscale", "fairscale"),
        Package("google_crc32c", "google-crc32c", "google-crc32c"),
        Package("matplotlib", "matplotlib", "matplotlib", "plots"),
        Package("nvidia.dali", "nvidia-dali (DALI)", "nvidia-dali-cuda130"),
        Package("onnx", "onnx", "onnx", "onnx"),
        Package("onnxruntime", "onnxruntime", "onnxruntime", "onnx"),
        Package("onnxscript", "onnxscript", "onnxscript", "onnx"),
        Package("PIL", "pillow", "pillow"),
        Package("pyarrow", "pyarrow", "'pyarrow>=14.0.1'", "parquet"),
        Package("shtab", "shtab", "shtab"),
        Package("sklearn", "scikit-learn", "scikit-learn", "digits"),
        Package("tensorboard", "tensorboard", "tensorboard", "monitors"),
        Package("timm", "timm", "timm"),
        Package("torch", "torch", "torch"),
        Package("wandb", "wandb", "wandb", "monitors"),
    )
}
"""By module."""


def find_package(module: str) -> Package | None:
    """The package of a module that could not be imported, if it is one of ours."""
    known = (found for name, found in PACKAGES.items() if name.split(".")[0] == module.split(".")[0])
    return next(known, None)


def require_packages(needed: Iterable[tuple[str, str]]) -> None:
    """needed: (setting, module) pairs. ValueError names the first setting whose package is missing."""
    if missing := missing_packages(needed):
        raise ValueError(missing[0])


def missing_packages(needed: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each setting whose package is missing."""
    return [
        f"{setting} needs a package: {PACKAGES[module].missing()}"
        for setting, module in needed
        if not PACKAGES[module].installed()
    ]
