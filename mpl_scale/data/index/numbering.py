"""Whether a set of numbered shards is complete: "N-of-M" says how many there are, "train-002" that there is a 001."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?(\.tfrecords?|\.parquet|\.arrow|\.tar)?")
"""Hugging Face has put a hash of the file behind the numbers."""


def refuse_gaps(root: Path, names: Sequence[str]) -> None:
    """ValueError where a set of files numbered "N-of-M", from 0 or from 1, is not complete, or there twice.

    Splits by shard would move unseen, or images be seen twice.
    """
    sets: dict[tuple[str, str], dict[int, dict[int, str]]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(_unpacked(name))
        if match:
            numbers = sets.setdefault((match[1], match[4] or ""), {}).setdefault(int(match[3]), {})
            other = numbers.setdefault(int(match[2]), name)
            if other != name:
                raise ValueError(
                    f"mpl_scale.data.root = '{root}' holds shard {int(match[2])} twice, as '{other}' and '{name}'; "
                    "remove one"
                )
    for (stem, suffix), by_count in sets.items():
        if len(by_count) > 1:
            both = " and ".join(f"'{stem}-*-of-{count:05d}{suffix}'" for count in sorted(by_count)[:2])
            raise ValueError(
                f"mpl_scale.data.root = '{root}' holds both {both}: its images would be seen twice; remove one set"
            )
        for count, numbers in by_count.items():
            _refuse_incomplete(root, f"{stem}-*-of-{count:05d}{suffix}", numbers.keys(), count)


def _refuse_incomplete(root: Path, pattern: str, numbers: Collection[int], count: int) -> None:
    """ValueError where these are not 0 to count - 1, nor 1 to count."""
    first = 1 if count in numbers and 0 not in numbers else 0
    beyond = max(numbers) - first - count + 1
    if beyond > 0:
        raise ValueError(
            f"mpl_scale.data.root = '{root}' holds number {max(numbers)} of the {count} shards '{pattern}', beside "
            f"number {min(numbers)}; remove what is not of the set"
        )
    if len(numbers) < count:
        absent = next(number for number in range(first, first + count) if number not in numbers)
        raise ValueError(
            f"mpl_scale.data.root = '{root}' holds {len(numbers)} of the {count} shards '{pattern}'; number {absent} "
            "is missing: fetch it, or give another folder the shards you have under names that do not promise more"
        )


def gaps(names: Sequence[str]) -> list[str]:
    """Numbers missing between those of shards whose names differ in one number only, for people.

    "N-of-M" is refuse_gaps' affair. Where several numbers differ (dates, workers and shards) nothing is promised.
    """
    found = []
    for pattern, numbers in _sequences(names).items():
        lowest, highest = min(numbers), max(numbers)
        if highest - lowest >= len(numbers):
            absent = next(number for number in range(lowest, highest) if number not in numbers)
            found.append(f"'{pattern}' lacks number {absent}, between {lowest} and {highest}")
    return found


def late_starts(names: Sequence[str]) -> list[str]:
    """Sets of numbered shards that begin neither at 0 nor at 1, for people."""
    return [
        f"the numbers of '{pattern}' begin at {min(numbers)}: earlier shards, if there are any, are not here"
        for pattern, numbers in _sequences(names).items()
        if min(numbers) > 1
    ]


def _sequences(names: Sequence[str]) -> dict[str, set[int]]:
    """The numbers of shards that differ in one number of their names, by the name with a star in its place."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name in map(_unpacked, names):
        if not _NUMBERED.fullmatch(name):
            folder, slash, base = name.rpartition("/")
            groups.setdefault(folder + slash + re.sub(r"\d+", "*", base), []).append(tuple(re.findall(r"\d+", base)))
    found = {}
    for pattern, rows in groups.items():
        columns = [set(column) for column in zip(*rows, strict=True)]
        varying = [column for column in columns if len(column) > 1]
        if len(varying) == 1:
            found[pattern] = set(map(int, varying[0]))
    return found


def _unpacked(name: str) -> str:
    """What a packed archive would be called: some of a set may be packed."""
    return re.sub(r"\.(tar\.gz|tgz)$", ".tar", name)
