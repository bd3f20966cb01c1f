"""Large-scale Meta Pseudo Labels: teacher and student under ZeRO, one step, from a laptop to a cluster.

The names of `__all__` are the library (docs/library.md); torch is imported when the first of them needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpl_scale.api import Loader, build_state, predict, step, train
    from mpl_scale.config import load_config

__all__ = ["Loader", "build_state", "load_config", "predict", "step", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mpl_scale' has no attribute '{name}'")
    return getattr(import_module("mpl_scale.config" if name == "load_config" else "mpl_scale.api"), name)
