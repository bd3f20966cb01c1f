"""Runs of a report that were never trained, and its page read back."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mpl_scale.report.material import Material
from mpl_scale.report.runs import STEPS, Run, add_runs

EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
RULE = "method__feedback__rule"


class Page(HTMLParser):
    """Tables as rows of cells under the heading before them; every address; and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self._heading = self._text = ""
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "srcset", "href")]
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th", "h2", "h3"):
            self._text = ""
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("h2", "h3"):
            self._heading = self._text
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append(self._text)

    def handle_data(self, data: str) -> None:
        self._text += data


def trial(folder: str, *, seed: int = 0, steps: int = 1, **settings: Any) -> Run:
    """A run that ended with its learning rate as its accuracy; curves of a step. settings: of the section mpl_scale."""
    settings = {"seed": seed, "method__name": "mpl", "data__labelled_per_class": 4, **settings}
    given = {f"mpl_scale.{name.replace('__', '.')}": value for name, value in settings.items()} | {STEPS: steps}
    metrics = [{"global_step": 1, "phase": "train", "step": 1, "student_accuracy": 0.5, "part": "train"}]
    top1 = given.get("mpl_scale.optim.student.lr", 0.0)
    return Run(Path(folder), given, {"results": {"student": {"top1": top1}}, "steps": 1}, metrics, {})


def material_of(runs: list[Run]) -> Material:
    material = Material()
    add_runs(material, runs)
    return material
