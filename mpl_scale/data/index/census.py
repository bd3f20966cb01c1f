"""What a data set was seen to hold beside its samples: images by file format, and everything that is not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

NAMED = 10
"""Unused files that are named; the others are counted."""


@dataclass
class Census:
    """kinds: images by file format. unused: what is not used, by its ending. names: the first NAMED of those."""

    kinds: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def leave_out(self, name: str, kind: str | None = None) -> None:
        """Count a file, or a member of a shard, that is not used; kind: None: its ending."""
        self.unused[kind or PurePosixPath(name).suffix.lower() or "without an ending"] += 1
        if len(self.names) < NAMED:
            self.names.append(name)

    def update(self, other: Census) -> None:
        """Add what another part of the data set holds."""
        self.kinds.update(other.kinds)
        self.unused.update(other.unused)
        self.names = (self.names + other.names)[:NAMED]

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {"kinds": dict(self.kinds), "unused": dict(self.unused), "names": self.names}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Census:
        """The inverse of to_json; an empty mapping is an empty census."""
        return cls(Counter(values.get("kinds", {})), Counter(values.get("unused", {})), list(values.get("names", ())))

    def lines(self) -> list[str]:
        """For people: one line for the formats, one for what is not used, where there is any."""
        found = []
        if self.kinds:
            found.append(f"images by format: {_listed(self.kinds)}")
        if count := sum(self.unused.values()):
            more = f" and {count - len(self.names):,} more" if count > len(self.names) else ""
            found.append(f"not used: {count:,} ({_listed(self.unused)}): {', '.join(self.names)}{more}")
        return found


def _listed(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
