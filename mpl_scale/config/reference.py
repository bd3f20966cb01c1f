"""docs/config.md, made from the schema: `python -m mpl_scale.config.reference > docs/config.md`."""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mpl_scale.config.deepspeed_keys import SECTIONS, TOP_LEVEL
from mpl_scale.config.schema import Config

HEAD = """# The "mpl_scale" section

Made from the schema by `python -m mpl_scale.config.reference > docs/config.md`; a test compares them.
A ds_config holds DeepSpeed's own keys (its documentation) and this section. Unknown keys are refused in both.
A field without a default must be given. `include` at the top level names files to start from.
"""
_BOUNDS = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "below"),
)


def reference() -> str:
    """The page docs/config.md, in Markdown."""
    parts = [HEAD]
    for path, section in _sections(Config, "mpl_scale"):
        parts.append(f"\n## {path}\n\n{(section.__doc__ or '').strip()}\n")
        rows = [_row(name, field) for name, field in section.model_fields.items() if _inner(field.annotation) is None]
        if rows:
            parts.append("\n| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows))
    return "".join(parts)


def _sections(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below, each with its path; teacher and student have one description."""
    yield path, section
    seen: dict[type[BaseModel], str] = {}
    for name, field in section.model_fields.items():
        inner = next(filter(None, map(_inner, (field.annotation, *typing.get_args(field.annotation)))), None)
        if inner is not None:
            seen[inner] = f"{seen[inner]}, {name}" if inner in seen else f"{path}.{name}"
    for inner, where in seen.items():
        yield from _sections(inner, where)


def _inner(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _row(name: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "must be given"
    elif field.default_factory is not None:
        default = f"`{json.dumps(field.default_factory())}`"  # type: ignore[call-arg]
    else:
        default = f"`{json.dumps(field.default)}`"
    kind = _type(field.annotation)
    bounds = _bounds(field.metadata)
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {kind}{f', {bounds}' if bounds else ''} | {default} | {meaning} |\n"


def _bounds(metadata: list[Any]) -> str:
    found = []
    for item in metadata:
        for kind, attribute, words in _BOUNDS:
            if isinstance(item, kind):
                found.append(f"{words} {getattr(item, attribute):g}")
    return ", ".join(found)


def _type(annotation: Any) -> str:
    """The type as a page shows it: JSON's name of it, or the choices."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = _bounds([item for given in annotation.__metadata__ for item in _flat(given)])
        return f"{_type(arguments[0])}{f' {bounds}' if bounds else ''}"
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" {len(arguments)}:"
        return f"list of{count} {_type(arguments[0])}"
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "object"
    if _inner(annotation) is not None:
        return "a section"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _flat(given: Any) -> list[Any]:
    return list(given.metadata) if isinstance(given, FieldInfo) else [given]


HONOURED = {
    "run": "every run",
    "tuning": "engine deepspeed; ignored with a warning by engine flat",
    "engine": "engine deepspeed; refused with engine flat",
    "ignored": "ignored with a warning",
    "refused": "refused",
}


def deepspeed_reference() -> str:
    """The table of DeepSpeed's keys in docs/troubleshooting.md, Markdown; a row for each section, effect and reason."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for section, keys in {"": TOP_LEVEL, **SECTIONS}.items():
        for name, key in keys.items():
            if key.effect == "refused" or key.kind != "section" or f"{section}.{name}".lstrip(".") not in SECTIONS:
                rows.setdefault((section, key.effect, key.why), []).append(name)
    lines = ["| section | keys | honoured by |", "|---|---|---|"]
    for (section, effect, why), names in rows.items():
        shown = ", ".join(f"`{name}`" for name in names)
        honoured = HONOURED[effect] + (f": {why}" if why else "")
        lines.append(f"| {f'`{section}`' if section else ''} | {shown} | {honoured} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(deepspeed_reference() if "--deepspeed" in sys.argv else reference(), end="")
