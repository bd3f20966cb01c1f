"""The questions of `mpl-scale init --ask`: data, classes, image size and GPUs; the answers as settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mpl_scale.config import RunConfig, load_config
from mpl_scale.config.shipped import shipped_path

if TYPE_CHECKING:
    from mpl_scale.planner.job import Machine

Answer = TypeVar("Answer")


def ask(question: str, default: str, read: Callable[[str], Answer]) -> Answer:
    """Ask until `read` takes the answer; an empty one is the default.

    Raises:
        ValueError: the input has ended.
    """
    while True:
        try:
            text = input(f"{question} [{default}]: ").strip() or default
        except EOFError as error:
            raise ValueError(f"init --ask: no answer to '{question}'; give the settings by --set instead") from error
        try:
            return read(text)
        except ValueError as error:
            print(error)


def asked(name: str, given: list[str]) -> tuple[list[str], int]:
    """What the answers set, in the form of --set, and how many GPUs there are.

    Args:
        name: of the configuration that is started from.
        given: settings that are known already, as --set takes them.

    Raises:
        ValueError: the input has ended, or no plan of the run fits the GPUs.
    """
    run = load_config(shipped_path(name), overrides=given)
    found: dict[str, Any] = {}
    classes = run.mpl.model.num_classes
    if labelled := ask("labelled images: a folder with a folder for each class", "the configuration's own", _folder):
        found |= {"mpl_scale.paper": f"none: own images, from {name}", "mpl_scale.data.labelled": str(labelled)}
        classes = sum(path.is_dir() for path in labelled.iterdir()) or classes
        if unlabelled := ask("unlabelled images: a folder", "the labelled ones", _folder):
            found["mpl_scale.data.unlabelled"] = str(unlabelled)
    found["mpl_scale.model.num_classes"] = ask("number of classes", str(classes), _count)
    found["mpl_scale.model.image_size"] = ask("image size in pixels", str(run.mpl.model.image_size), _count)
    overrides = [*given, *(f"{field}={json.dumps(value)}" for field, value in found.items())]
    gpus = ask("number of GPUs", "0", _count_or_zero)
    if gpus:
        from mpl_scale.trainer.planning import make_machine

        machine = ask("which: h200, h100-80, a100-80, a100-40 or v100-16", "h200", make_machine)
        overrides += _cut(load_config(shipped_path(name), overrides=overrides), gpus, machine)
    return overrides, gpus


def _cut(run: RunConfig, gpus: int, machine: Machine) -> list[str]:
    """The settings of the planner's fastest plan that fits."""
    from mpl_scale.cli.fit import what_would_fit
    from mpl_scale.cli.plan import job_of
    from mpl_scale.planner.search import search

    plans = search(job_of(run, machine), gpus, machine)
    if not plans.fitting:
        raise ValueError(f"{gpus} x {machine.device.name}: {what_would_fit(plans)}")
    best = plans.fitting[0]
    print(f"{gpus} x {machine.device.name}: {best.choice}, about {1e3 * best.duration.total:.0f} ms a step")
    return [f"{field}={json.dumps(value)}" for field, value in best.choice.settings().items()]


def _folder(text: str) -> Path | None:
    """A folder; None for a default, which is no path."""
    if text.startswith("the "):
        return None
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ValueError(f"{text} is no folder")
    return path.resolve()


def _count(text: str) -> int:
    if not (text.isdecimal() and 0 < len(text) < 10 and int(text)):
        raise ValueError(f"{text!r} is no whole number from 1")
    return int(text)


def _count_or_zero(text: str) -> int:
    return 0 if text == "0" else _count(text)
