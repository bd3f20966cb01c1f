"""Read a ds_config, apply --set, refuse unknown keys in both halves with "did you mean", validate, resolve.

DeepSpeed accepts unknown top-level keys silently ("gradient_clipp1ng" trains unclipped); here both halves are closed.
A file may include others, so that variants of an experiment say only what differs.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mpl_scale.config.deepspeed_half import validated
from mpl_scale.config.former import former_notes, renamed, without_former_fields
from mpl_scale.config.names import Registry, suggest
from mpl_scale.config.presets import apply_preset, merge
from mpl_scale.config.schema import Config
from mpl_scale.config.unused import unused_settings

SECTION = "mpl_scale"
INCLUDE = "include"
MOST_LEVELS = 50
SHOWN = 200
"""Characters of a value that an error shows."""
_TOO_DEEP = (
    f"values are nested more than {MOST_LEVELS} levels deep; a ds_config has 5, and kwargs of a model a few more"
)
_TOO_LONG = "a whole number has thousands of digits; write one that a run can use"


@dataclass(frozen=True)
class RunConfig:
    """A validated configuration: our section, DeepSpeed's half, where it was read, and what to say of it to people."""

    path: Path
    mpl: Config
    deepspeed: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """The whole configuration with every default filled in: written beside the run, loadable again."""
        return {**self.deepspeed, SECTION: self.mpl.model_dump(mode="json")}


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a ds_config.

    A top-level "include" names another file, or a list of them, relative to the one it stands in. They are merged in
    order, section by section, and the file's own values go on top; a list is a value, replaced as a whole.

    Args:
        path: the JSON file.
        overrides: "a.b.c=value" assignments applied to the JSON; a value that parses as JSON is taken as such.

    Raises:
        ValueError: one line that names the file or field, and the fix.
    """
    path = Path(path)
    raw, layers = _merged(path, overrides)
    section = raw.pop(SECTION, None)
    if not isinstance(section, dict):
        raise ValueError(f'{path}: there is no "{SECTION}" section; add one, see ds_configs/digits.json')
    deepspeed = validated(raw, path=path, known_beside=(SECTION, INCLUDE))
    notes = former_notes(section)
    try:
        section = without_former_fields(section)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _refuse_unknown_fields(section, Config, SECTION, path)
    if isinstance(section.get("method"), dict):
        section = {**section, "method": apply_preset(section["method"])}
    try:
        # JSON mode: strict types, but a list for a tuple and an integer for a float, as JSON has them.
        mpl = Config.model_validate_json(json.dumps(section))
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_error(error)}") from None
    idle = import_modules(mpl.imports)
    notes += [f"no effect here: mpl_scale.imports = {', '.join(idle)} (registers nothing)"] if idle else []
    notes += unused_settings(mpl, [renamed(given) for layer in layers if isinstance(given := layer.get(SECTION), dict)])
    return RunConfig(path=path, mpl=mpl, deepspeed=deepspeed, notes=tuple(f"{path}: {note}" for note in notes))


def read_config(path: str | Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A ds_config with what it includes and `overrides` as one JSON object, not validated; errors as of load_config."""
    return _merged(Path(path), overrides)[0]


def _merged(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The merged object, and the files that it is of, included ones first."""
    raw, layers = _read_with_includes(path)
    for assignment in overrides:
        if assignment.partition("=")[0].strip() == INCLUDE:
            raise ValueError(f"--set {assignment}: {INCLUDE} is read in files alone; write it in {path}")
        _assign(raw, assignment)
        _assign(layers[-1], assignment)
    _refuse_deep(raw, path)
    return raw, layers


def import_modules(modules: Sequence[str]) -> list[str]:
    """Run the user's modules (`imports`), which register what the config then names; those that register nothing.

    ValueError: one cannot be imported.
    """
    idle = []
    for module in modules:
        before = len(Registry.registrants)
        try:
            found = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever its code raises; sys.exit(0) would end a run in silence
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(
                f"{SECTION}.imports = {module!r}: {why}; it must be a module that Python "
                "finds (PYTHONPATH, or installed) and that imports without an error"
            ) from error
        if len(Registry.registrants) == before and not _registers(found):
            idle.append(module)
    return idle


def _registers(module: types.ModuleType) -> bool:
    """Whether the module, one below it, or one it takes something from has registered something, here or in timm."""
    taken = {str(getattr(value, "__module__", getattr(value, "__name__", ""))) for value in vars(module).values()}
    below = (name for name in Registry.registrants if name.startswith(f"{module.__name__}."))
    if any(below) or not taken.isdisjoint(Registry.registrants) or module.__name__ in Registry.registrants:
        return True
    timm = sys.modules.get("timm")
    return timm is not None and module.__name__.rpartition(".")[2] in timm.list_modules()


def _read_with_includes(path: Path, *, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The file over the files it includes, and each of them by itself, the file's own last.

    including: the files on the way to it.
    """
    chain = (*including, path)
    if path.resolve() in [file.resolve() for file in including]:
        raise ValueError(f"{' includes '.join(map(str, chain))}: a circle; remove one of the includes")
    if len(including) > MOST_LEVELS:
        raise ValueError(f"{including[0]}: more than {MOST_LEVELS} files include one another; include fewer")
    raw = _read(path, including=including)
    names = raw.pop(INCLUDE, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {INCLUDE} = {names!r}: must be the path of a ds_config, or a list of paths")
    merged: dict[str, Any] = {}
    layers: list[dict[str, Any]] = []
    for name in names:
        included, below = _read_with_includes(path.parent / name, including=chain)
        merged, layers = merge(merged, included), layers + below
    return merge(merged, raw), [*layers, copy.deepcopy(raw)]


def _read(path: Path, *, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    where = f"{including[-1]}: {INCLUDE}" if including else "--ds_config"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a ds_config"
        raise ValueError(f"{where} {path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} {path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except _TwoKeys as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError:  # Python's limit
        raise ValueError(f"{path}: {_TOO_LONG}") from None
    except RecursionError:
        raise ValueError(f"{path}: {_TOO_DEEP}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: the top level must be a JSON object")
    _refuse_deep(raw, path)
    return raw


def _refuse_deep(value: Any, path: Path, *, level: int = 0) -> None:
    """ValueError for values that a recursive function could not walk."""
    if level > MOST_LEVELS:
        raise ValueError(f"{path}: {_TOO_DEEP}")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _refuse_deep(item, path, level=level + 1)


class _TwoKeys(ValueError):
    """An object with a key that stands twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _TwoKeys(f'key "{key}" stands twice; remove one')
        result[key] = value
    return result


def _assign(raw: dict[str, Any], assignment: str) -> None:
    """Apply one --set; missing sections on the way are made, so that unknown ones are refused by name later."""
    dotted, equals, text = assignment.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {assignment}: write it as section.field=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except RecursionError:
        raise ValueError(f"--set {dotted}: {_TOO_DEEP}") from None
    except ValueError:  # Python's limit
        raise ValueError(f"--set {dotted}={text[:20]}...: {_TOO_LONG}") from None
    target = raw
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ValueError(f"--set {assignment}: {key} is a value, not a section")
    target[keys[-1]] = value


def _refuse_unknown_fields(section: Mapping[str, Any], model: type[BaseModel], where: str, path: Path) -> None:
    """pydantic would refuse them too, but without a suggestion."""
    for key, value in section.items():
        if key not in model.model_fields:
            raise ValueError(f'{path}: unknown key "{where}.{key}"; {suggest(key, model.model_fields)}')
        inner = _section_type(model.model_fields[key].annotation)
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown_fields(value, inner, f"{where}.{key}", path)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section among a field's types, if any."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((t for a in typing.get_args(annotation) if (t := _section_type(a))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _field_path(place: Sequence[int | str]) -> Iterator[str]:
    """The names of fields and the numbers of elements; pydantic also names the types that a field may have."""
    section: type[BaseModel] | None = Config
    for part in place:
        if section is not None and part in section.model_fields:
            section = _section_type(section.model_fields[str(part)].annotation)
            yield str(part)
        elif isinstance(part, int):
            yield str(part)


def _first_error(error: ValidationError) -> str:
    by_field: dict[tuple[str, ...], list[Any]] = {}
    for found in error.errors():
        field = tuple(name for name in _field_path(found["loc"]) if not name.isdigit())
        by_field.setdefault(field, []).append(found)
    first = max(next(iter(by_field.values())), key=lambda found: len(found["loc"]))  # of several types, the nearest
    where = ".".join((SECTION, *_field_path(first["loc"])))
    more = f" (and {len(by_field) - 1} more)" if len(by_field) > 1 else ""
    if first["type"] == "missing":
        return f"{where} is missing; it has no default{more}"
    value = repr(first["input"])
    value = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    return f"{where} = {value}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"
