"""Which format the files below a folder have: by the very names that each format looks for, never by a guess."""

from __future__ import annotations

from pathlib import Path

from mpl_scale.data.index.format import FORMATS, NoShards

PLAIN = {"folder": True, "images": False}
"""Formats of single files, and whether they have labels: one of them is looked for beside the others."""

LIST = "table"
"""A list of files, beside them: what it says has precedence."""


def find_format(root: Path, *, labels: bool = True, fix: str = "name it with --source") -> str:
    """The one format whose files lie below `root`; `folder`, or without labels `images`, where they are single images.

    Args:
        root: a folder.
        labels: whether images with labels are looked for.
        fix: what to do where there are several.

    Raises:
        ValueError: no folder; the files are of several formats, or of none; or some of a format's are missing.
    """
    if not root.is_dir():
        raise ValueError(f"mpl_scale.data.root = '{root}' is no folder; give the one that holds the data set")
    found, faults = [], list[ValueError]()
    asked = FORMATS.keys() - {plain for plain, has in PLAIN.items() if has != labels}
    for name in sorted(asked, key=lambda name: (name in PLAIN, name)):  # a folder of shards is a faulty `folder`, too
        try:
            FORMATS[name].shards(root)
        except NoShards:
            continue
        except ValueError as error:
            faults.append(error)
        else:
            found.append(name)
    if LIST in found:
        return LIST
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"mpl_scale.data.root = '{root}' holds files of several formats, {', '.join(found)}; {fix}")
    if faults:
        raise faults[0]
    raise ValueError(f"mpl_scale.data.root = '{root}' holds no data set of a known format; see docs/data.md, or {fix}")
