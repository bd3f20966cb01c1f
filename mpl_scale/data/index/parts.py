"""Which part of a data set a shard belongs to, by its exact name; and the files of a data set, links followed.

The name of a shard decides where it begins with one of the words of PARTS ("val-000.tar") or ends with one before its
numbers ("imagenet-val-000.tar", "cifar10-test.tfrecord-00000-of-00001"). Otherwise the nearest folder decides whose
whole name is such a word ("val/000.tar"). Everything else is for training: nothing is guessed from parts of names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mpl_scale.data.index.census import Census
from mpl_scale.data.index.format import Layout, NoShards, Part, Shard

PARTS: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing", "testset"), "test"),
}
"""The words that decide, in lower case."""
_NUMBERS = re.compile(r"(\.tar|\.gz|\.tgz|\.tfrecords?|\.parquet|\.arrow|[-_.]?\d+|-of)+$")
_WORD = re.compile(r"[a-z]+")
_SIDECARS = re.compile(
    r"(batches\.meta(\.txt)?|class_names\.txt|fold_indices\.txt|dataset_infos?\.json|dataset_dict\.json|state\.json|"
    r"readme.*|license.*)",
    re.IGNORECASE,
)
_COMPRESSED = (".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tbz2", ".txz", ".tfrecord.gz", ".tfrecords.gz")


class Folder(NamedTuple):
    """A folder: its path relative to the root ("" for the root), its files, and links to a folder they lie in."""

    name: str
    files: list[str]
    loops: list[str]


def walk(root: Path, start: str = "") -> Iterator[Folder]:
    """The folder `start` of the root, and all below it, in the order of their names.

    Hidden files and folders are skipped. Links to folders are followed, unless they lead to a folder they lie in.
    """
    above = [root.resolve(), *root.resolve().parents]
    above += [root.joinpath(*PurePosixPath(start).parts[:depth]) for depth in range(1, len(PurePosixPath(start).parts))]
    return _walk(str(root / start), start, frozenset(map(_identity, above)))


def _walk(path: str, name: str, above: frozenset[tuple[int, int]]) -> Iterator[Folder]:
    above |= {_identity(path)}
    files, folders, loops = list[str](), list[str](), list[str]()
    for entry in os.scandir(path):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            files.append(entry.name)
        elif entry.is_symlink() and _identity(entry.path) in above:
            loops.append(entry.name)
        else:
            folders.append(entry.name)
    yield Folder(name, sorted(files), sorted(loops))
    for folder in sorted(folders):
        yield from _walk(f"{path}/{folder}", f"{name}/{folder}" if name else folder, above)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def part_of(name: str) -> Part:
    """The part of the shard at a relative path."""
    return _decided(name) or "train"


def doubtful(name: str, part: Part) -> bool:
    """Whether a shard of the training part has no name that says so, but a word for tests in its path."""
    words = _WORD.findall(name.lower())
    return part == "train" and _decided(name) != "train" and any(PARTS.get(word) == "test" for word in words)


def _decided(name: str) -> Part | None:
    *folders, base = name.lower().split("/")
    words = _WORD.findall(_NUMBERS.sub("", base))
    for word in [*words[:1], *words[-1:], *reversed(folders)]:
        if word in PARTS:
            return PARTS[word]
    return None


def find_shards(root: Path, pattern: str, *, what: str) -> list[Shard]:
    """The files below `root`, at any depth, whose name the regular expression matches; sorted by part, then name.

    Raises:
        NoShards: there is none.
    """
    found = [
        Shard(path, part_of(path))
        for folder in walk(root)
        for name in folder.files
        if re.fullmatch(pattern, name) and (root / (path := _join(folder.name, name))).is_file()
    ]
    if not found:
        packed = [path for path in left_over(root, [], layout="encoded").names if path.lower().endswith(_COMPRESSED)]
        fix = f"decompress its shards, such as '{packed[0]}'" if packed else "name the folder of the shards"
        raise NoShards(f"mpl_scale.data.root = '{root}' holds no {what}; {fix}")
    return sorted(found, key=lambda shard: (shard.part == "test", shard.name))


def left_over(root: Path, shards: Sequence[Shard], *, layout: Layout, sidecars: Sequence[str] = ()) -> Census:
    """The files below `root` that belong to no shard; sidecars, labels, class names and the like do not count."""
    census, names = Census(), {shard.name for shard in shards}.union(sidecars)
    above = [] if names & {"", "."} else [next(walk(root))]  # the root is itself a folder of samples
    folders = walk(root) if layout == "encoded" else [*above, *_parts_below(root, names)]
    for folder in folders:
        for name in [*folder.files, *folder.loops]:
            path = _join(folder.name, name)
            if path in names or _SIDECARS.fullmatch(name):
                continue
            if name.lower().endswith(_COMPRESSED):
                census.leave_out(path, "compressed shards; decompress them")
            elif name in folder.loops:
                census.leave_out(path, "links to a folder above")
            else:
                census.leave_out(path)
    return census


def _parts_below(root: Path, shards: set[str]) -> list[Folder]:
    """The part folders that hold class folders: a file right in one is of no class."""
    found = {name.partition("/")[0] for name in shards if "/" in name and is_part(name.partition("/")[0])}
    found |= {name for name in os.listdir(root) if is_part(name) and (root / name).is_dir()}
    return [next(walk(root, name)) for name in sorted(found - shards)]


def parts_line(counts: Sequence[tuple[str, Part, int]]) -> list[str]:
    """For people: images by part, with the names of its shards; and the doubtful names.

    Args:
        counts: name, part and images of each shard.
    """
    if not counts:
        return []
    described = []
    for wanted in ("train", "extra", "unlabelled", "test"):
        own = [(name, images) for name, part, images in counts if part == wanted]
        if own:
            patterns = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name, _ in own))
            more = f" and {len(patterns) - 5} more names" if len(patterns) > 5 else ""
            names = "" if patterns == ["."] else f" ({', '.join(patterns[:5])}{more})"
            described.append(f"{wanted} {sum(images for _, images in own):,}{names}")
    lines = [f"images by part: {', '.join(described)}"]
    doubts = [name for name, part, _ in counts if doubtful(name, part)]
    if doubts:
        more = f" and {len(doubts) - 10} more" if len(doubts) > 10 else ""
        lines.append(
            f"used for training, though the name speaks of another part: {', '.join(doubts[:10])}{more}; if they are "
            "test data, move them into a folder named test"
        )
    return lines


def is_part(folder: str) -> bool:
    """Whether a folder's whole name stands for a part."""
    return folder.lower() in PARTS


def _join(folder: str, name: str) -> str:
    return str(PurePosixPath(folder, name))
