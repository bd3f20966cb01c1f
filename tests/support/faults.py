"""Faults that tests provoke, and what docs/faults.md says of one, compared with what a run said."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()


def check_documented(said: str, *, folder: Path) -> None:
    """Fail unless the page shows this message; numbers, checksums, `folder` and this host's name may be others."""
    text = re.sub(rf"\b{re.escape(os.uname().nodename)}\b", "n1", said.replace(str(folder), "runs"))
    assert _mask(text) in _mask(PAGE), text


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As a full disk does, writing a larger file fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _mask(text: str) -> str:
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,12}\b", "#", text)
    return " ".join(re.sub(r"\d[\d,.]*", "#", text).split())
