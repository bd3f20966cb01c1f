"""Settings that were given and have no effect beside the others: harmless, but not what their author thinks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpl_scale.config.presets import flatten
from mpl_scale.config.readers import READERS, Reader
from mpl_scale.config.schema import Config, OptimConfig

_REQUIRED = {
    "model": {"num_classes": 2, "image_size": 1, **{name: {"name": ""} for name in ("teacher", "student")}},
    "optim": {name: {"lr": 1.0} for name in ("teacher", "student")},
    "phases": {"train": {"steps": 1}},
}
"""Fields without a default: they stand in every file, and ask for nothing by that."""


def unused_settings(config: Config, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines that name the settings without effect, and those that the run is too short for; none where there are none.

    Args:
        config: validated.
        layers: the "mpl_scale" sections as they were written: of included files first, then of the file itself. What
            an included file gives and a later one's choice leaves without effect is inherited: it is not named. Nor
            is a default that is written out, which asks for nothing.
    """
    written = [flatten(layer) for layer in layers]
    level = {name: number for number, layer in enumerate(written) for name in layer}
    defaults = flatten(type(config).model_validate(_REQUIRED).model_dump(mode="json")) | flatten(_REQUIRED)
    values = flatten(config.model_dump(mode="json"))
    values |= {f"data.{name}": json.dumps(place) for name, place in _long_places(config)}
    asked = [
        name
        for name in level
        if name not in flatten(_REQUIRED) and (name not in defaults or defaults[name] != written[level[name]][name])
    ]
    found: dict[str, list[str]] = {}
    for reader in READERS:
        deciding = [values.get(name) for name in reader.by]
        if not reader.reads(*deciding):
            chosen = max(level.get(name, -1) for name in reader.by)
            for name in asked:
                twin = name.replace(".teacher.", ".student.")
                if reader.twins and values.get(name) == values.get(twin):
                    continue
                if level[name] >= chosen and _below(name, reader.fields):
                    found.setdefault(_because(reader, name, deciding), []).append(f"mpl_scale.{name}")
    named: set[str] = set()
    groups = []
    for because, names in found.items():
        new = [name for name in names if name not in named]
        named.update(new)
        groups += [f"{', '.join(new)} ({because})"] if new else []
    lines = [f"no effect here: {'; '.join(groups)}"] if groups else []
    late = list(_too_late(config))
    return lines + ([f"the run is too short for {'; '.join(late)}"] if late else [])


def _long_places(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places of images that are given with their source: sections of no fixed fields, so they are one value."""
    for name in ("labelled", "validation", "test"):
        place = getattr(config.data, name)
        if place is not None and not isinstance(place, str):
            yield name, place.model_dump(mode="json")


def _below(name: str, fields: Sequence[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _because(reader: Reader, name: str, deciding: Sequence[Any]) -> str:
    """The settings that leave a field without effect, relative to its section where they are in it."""

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    section = f"{name.rpartition('.')[0]}."
    return ", ".join(
        f"{by.removeprefix(section)} = {shown(value)}" for by, value in zip(reader.by, deciding, strict=True)
    )


def _too_late(config: Config) -> Iterator[str]:
    """Settings that count steps beyond the last one of their phase."""
    phases, method, rewind = config.phases, config.method, config.guard.rewind
    steps, wait = phases.train.steps, config.method.student_wait_steps
    longest = max(steps, phases.teacher_warmup.steps)
    for where, optim, last in (
        ("optim.teacher", config.optim.teacher, longest),
        ("optim.student", config.optim.student, steps - wait),
        ("phases.finetune.optim", config.phases.finetune.optim, phases.finetune.steps),
    ):
        yield from (f"mpl_scale.{where}.{late} of {last} steps" for late in _late_schedule(optim, last) if last)
    if method.uda.ramp_steps >= longest and method.uda.weight:
        yield f"mpl_scale.method.uda.ramp_steps = {method.uda.ramp_steps} of {longest} steps"
    if phases.train.evaluate_every > steps:
        yield f"mpl_scale.phases.train.evaluate_every = {phases.train.evaluate_every} of {steps} steps"
    lines = longest // config.logging.every
    if rewind is not None and rewind.window >= lines:
        yield f"mpl_scale.guard.rewind.window = {rewind.window} of {lines} lines of metrics"


def _late_schedule(optim: OptimConfig, steps: int) -> Iterator[str]:
    if optim.milestones and optim.milestones[-1] >= steps:
        yield f"milestones = {optim.milestones}"
    if optim.warmup_steps > steps:
        yield f"warmup_steps = {optim.warmup_steps}"
    if optim.schedule == "exponential" and optim.decay_steps >= steps:
        yield f"decay_steps = {optim.decay_steps}"
