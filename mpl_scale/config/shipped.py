"""The configurations that come with the package: `ds_configs/` of a clone, or its copy in an installed package."""

from __future__ import annotations

from pathlib import Path

from mpl_scale.config.load import read_config
from mpl_scale.config.names import suggest


def shipped_folder() -> Path:
    """Where they are."""
    package = Path(__file__).resolve().parents[1]
    clone = package.parent / "ds_configs"
    return clone if clone.is_dir() else package / "ds_configs"


def shipped_configs() -> dict[str, str]:
    """What each one is of, its `mpl_scale.paper`, by name."""
    names = sorted(path.stem for path in shipped_folder().glob("*.json"))
    return {name: read_config(shipped_folder() / f"{name}.json")["mpl_scale"]["paper"] for name in names}


def shipped_path(name: str) -> Path:
    """The file of a name.

    Raises:
        ValueError: there is none; with the nearest one.
    """
    names = [path.stem for path in shipped_folder().glob("*.json")]
    if name not in names:
        raise ValueError(f"no configuration is called '{name}'; {suggest(name, names)} (mpl-scale configs)")
    return shipped_folder() / f"{name}.json"
