"""The HTML page: tables and pictures in one file, without scripts, without anything from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpl_scale.report.controls import refusal, refused
from mpl_scale.report.material import LAST_STEPS, NETWORKS, Material, group_names, mean_and_deviation, top1_of
from mpl_scale.report.runs import STEPS, differing

FIELDS_AS_ROWS = 6
"""Up to that many configurations stand side by side in the table of differences; more stand one below the other."""
NUMBER = ' class="number"'
OPEN = 12
"""Runs whose table is unfolded."""
STYLE = """
:root { color-scheme: light dark; --face: #ffffff; --text: #1c1c1c; --soft: #5c5f63; --line: #d9d9d9; --band: #f5f6f7 }
@media (prefers-color-scheme: dark) {
  :root { --face: #16181b; --text: #e4e4e4; --soft: #a3a7ac; --line: #3b3f44; --band: #1e2125 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--face); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem } p { margin: .5rem 0; max-width: 46rem }
nav { color: var(--soft) } nav a { margin-right: 1rem } a { color: inherit; text-underline-offset: .15em }
.soft, figcaption { color: var(--soft); font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .9rem .32rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600; white-space: nowrap } thead th { border-bottom: 2px solid var(--line) }
tbody tr:hover { background: var(--band) }
.number { text-align: right; white-space: nowrap; padding-left: .6rem }
.fields th { white-space: normal; min-width: 7.5rem } .fields :first-child { min-width: 11rem }
.code { font-family: ui-monospace, "Liberation Mono", Consolas, monospace; font-size: .82rem; overflow-wrap: anywhere }
figure { margin: .5rem 0 1.5rem } figure img { display: block; width: 100%; height: auto }
figcaption { margin-top: .4rem; max-width: 46rem }
summary { cursor: pointer; color: var(--soft) }
@media print { details > * { display: block } h2 { break-after: avoid } figure { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Picture:
    """A picture in both themes, as data of that media type (image/svg+xml or image/png)."""

    name: str
    title: str
    caption: str
    alt: str
    width: float
    media: str
    light: bytes
    dark: bytes


def make_page(material: Material, pictures: Sequence[Picture], *, title: str) -> str:
    """The whole HTML document."""
    sections = [
        ("results", "Final accuracies", _results(material)),
        ("feedback", "Did the feedback say anything?", _feedback(material)),
        *((picture.name, picture.title, _figure(picture)) for picture in pictures),
        ("differences-of-settings", "What differs between the configurations", _differences(material)),
        ("origins", "Where the numbers come from", _origins(material)),
    ]
    sections = [section for section in sections if section[2]]
    links = " ".join(f'<a href="#{name}">{html.escape(heading)}</a>' for name, heading, _ in sections)
    body = "\n".join(
        f'<section id="{name}">\n<h2>{html.escape(heading)}</h2>\n{text}\n</section>'
        for name, heading, text in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[str] = (), code: bool = False
) -> str:
    """A table. numbers: the columns aligned to the right; code: cells are settings or commands."""
    right = [name in set(numbers) for name in columns]

    def cells(tag: str, row: Sequence[str]) -> str:
        mark = ' class="code"' if code and tag == "td" else ""
        shown = [
            html.escape(cell).replace(".", ".<wbr>") if tag == "th" and code else html.escape(cell) for cell in row
        ]
        return "".join(
            f"<{tag}{NUMBER if number else mark}>{cell}</{tag}>" for cell, number in zip(shown, right, strict=True)
        )

    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', columns)}</tr></thead>" if any(columns) else ""
    kind = ' class="fields"' if code else ""
    return f'<div class="wide"><table{kind}>\n{head}\n<tbody>\n{lines}\n</tbody></table></div>'


def _results(material: Material) -> str:
    """One table for each source: mean and deviation over seeds of every network, percent."""
    by_source: dict[str, list[tuple[float | None, str, list[str]]]] = {}
    for (source, labels), methods in material.tables().items():
        for method, runs in methods.items():
            cells = [_cell(top1_of(runs, network)) for network in NETWORKS]
            by_source.setdefault(source, []).append((labels, method, [*cells, str(len(runs))]))
    parts, lacking = [], refused(material)
    for source, rows in by_source.items():
        counted = any(labels is not None for labels, *_ in rows)
        used = [i for i in range(len(NETWORKS) + 1) if any(cells[i] for *_, cells in rows)]
        measured = [[*NETWORKS.values(), "runs"][i] for i in used]
        columns = ["configuration", *(["labels a class"] if counted else []), *measured]
        lines = [
            [
                method,
                *(["" if labels is None else f"{labels:g}"] if counted else []),
                *(cells[i] for i in used),
            ]
            for labels, method, cells in rows
        ]
        flag = _unequal_steps(material) if source == "runs" else ""
        if source in lacking:
            flag += f"\n<p><strong>No gain without a control.</strong> {html.escape(refusal(lacking[source]))}</p>"
        parts.append(f"<h3>{html.escape(source)}</h3>\n{table(columns, lines, numbers=columns[1:])}{flag}")
    for source, by_method in material.by_setting().items():
        settings = list(dict.fromkeys(setting for cells in by_method.values() for setting in cells))
        lines = [
            [method, *(_cell(top1_of(cells.get(setting, []), "student")) for setting in settings)]
            for method, cells in by_method.items()
        ]
        count = max(len(runs) for cells in by_method.values() for runs in cells.values())
        shown = table(["student", *settings], lines, numbers=settings)
        parts.append(f"<h3>{html.escape(source)}, up to {count} seeds</h3>\n{shown}")
    note = "Top-1 accuracy on the test images, percent: mean and, over two runs or more, sample standard deviation."
    return f'<p class="soft">{note}</p>\n' + "\n".join(parts) if parts else ""


def _feedback(material: Material) -> str:
    """Signal and noise of h where there are two lines of it, whether its sign was right, and how many labels were."""
    rows, measured = [], False
    for group, name in zip(material.groups, group_names(material.groups), strict=True):
        if len(group.feedback) > 1:
            mean, deviation = mean_and_deviation(group.feedback)
            ratio = f"{abs(mean) / deviation:.2f}" if deviation else "no noise"
            positive = sum(h > 0 for h in group.feedback) / len(group.feedback)
            controls = [one for one in material.groups if (one.label, one.labels) == (group.twin, group.labels)]
            right = [f"{mean_and_deviation(one.right)[0]:.1%}" if one.right else "" for one in (group, *controls)]
            measured |= bool(group.drops)
            cells = [f"{mean:+.4f} ± {deviation:.4f}", ratio, f"{positive:.0%}", _agreement(group.drops)]
            rows.append([name, *cells, *right[:1], *(right[1:] or [""]), str(len(group.feedback))])
    if not rows:
        return ""
    columns = ["configuration", "h", "signal to noise", "h above 0", "sign of h right", "labels right", "without h"]
    note = (
        f"h, the student's feedback, in the lines of metrics of the last {LAST_STEPS:,} steps: mean and deviation from "
        "line to line, and their ratio. Far below 1, a step's feedback is mostly noise, and only its sum over many "
        "steps can move the teacher. Labels right: of the pseudo labels whose truth the source tells; without h: those "
        "of the control with h = 0, which alone tells whether the feedback did anything."
    )
    sign = (
        "Sign of h right: how often h, before its baseline, is positive just where the student's update lowered its "
        "loss on labelled images. By chance: of two signs as frequent as these that know nothing of each other."
    )
    if not measured:
        sign = (
            "Whether the sign of h was right is not known: no rule but loss_difference and kekmodel measures the "
            "labelled loss before the student's update, as the others do with mpl_scale.logging.labelled_loss_drop."
        )
    shown = table([*columns, "lines"], rows, numbers=[*columns[1:], "lines"])
    return f'<p class="soft">{note}</p>\n<p class="soft">{sign}</p>\n{shown}'


def _agreement(drops: Sequence[tuple[float, ...]]) -> str:
    """How often both of a pair are above 0 or neither is, and how often they would be by chance."""
    if not drops:
        return "not measured"
    signs = [(h > 0, drop > 0) for h, drop in drops]
    agree = sum(h == drop for h, drop in signs) / len(signs)
    p, q = (sum(column) / len(signs) for column in zip(*signs, strict=True))
    return f"{agree:.0%} (by chance {p * q + (1 - p) * (1 - q):.0%})"


def _unequal_steps(material: Material) -> str:
    """Which configurations trained for how many steps, where these differ."""
    by_steps: dict[int, list[str]] = {}
    for group, name in zip(material.groups, group_names(material.groups), strict=True):
        by_steps.setdefault(int(group.settings.get(STEPS, 0)), []).append(name)
    if len(by_steps) < 2:
        return ""
    listed = "; ".join(f"{steps} steps: {', '.join(names)}" for steps, names in sorted(by_steps.items()))
    heading = "<strong>These rows were trained for unequal numbers of steps</strong> (all phases)"
    return f"\n<p>{heading}: {html.escape(listed)}.</p>"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {deviation:.2f}"


def _figure(picture: Picture) -> str:
    def source(data: bytes) -> str:
        return f"data:{picture.media};base64,{base64.b64encode(data).decode()}"

    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{source(picture.dark)}">'
        f'<img src="{source(picture.light)}" alt="{html.escape(picture.alt)}" '
        f'style="max-width: {picture.width:g}in"></picture>\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _differences(material: Material) -> str:
    groups = material.groups
    fields = differing([group.settings for group in groups]) if len(groups) > 1 else []
    if not fields:
        return ""
    names = group_names(groups)
    values = [[_setting(group.settings.get(field, "-")) for group in groups] for field in fields]
    if len(groups) <= FIELDS_AS_ROWS:
        rows = [[field, *row] for field, row in zip(fields, values, strict=True)]
        shown = table(["field", *names], rows, code=True)
    else:
        rows = [[name, *(row[i] for row in values)] for i, name in enumerate(names)]
        shown = table(["configuration", *fields], rows, code=True)
    return f'<p class="soft">Only fields that differ, defaults included; seeds aside.</p>\n{shown}'


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _origins(material: Material) -> str:
    """Runs as rows of one table; a benchmark's file with its command."""
    runs = [origin for origin in material.origins if "configuration" in origin.facts]
    parts = []
    for origin in material.origins:
        if origin not in runs:
            rows = [[name, value] for name, value in origin.facts.items()]
            parts.append(f"<h3>{html.escape(str(origin.path))}</h3>\n{table(['', ''], rows, code=True)}")
    if runs:
        columns = list(dict.fromkeys(name for origin in runs for name in origin.facts if name != "versions"))
        rows = [[str(origin.path), *(origin.facts.get(name, "") for name in columns)] for origin in runs]
        words = ("configuration", "config file", "state", "engine", "device", "processor", "command")
        numbers = [name for name in columns if name not in words]
        text = table(["folder", *columns], rows, numbers=numbers)
        versions = dict.fromkeys(origin.facts["versions"] for origin in runs if "versions" in origin.facts)
        text += "".join(f'\n<p class="soft">{html.escape(one)}</p>' for one in versions)
        opened = " open" if len(runs) <= OPEN else ""
        parts.append(f"<h3>Runs</h3>\n<details{opened}><summary>{len(runs)} runs</summary>\n{text}\n</details>")
    return "\n".join(parts)
