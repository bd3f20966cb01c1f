"""Fields of earlier versions, in files that users keep and in the configuration that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PORTS_FEEDBACK = {"old_loss": "update_pass", "target": "strong_argmax"}
"""Former fields of method.feedback, as the rule kekmodel has them."""
_SAME = ("lr", "momentum", "nesterov", "weight_decay", "rho", "eps", "trust")
FINETUNE = {"optimizer": "name", **{name: name for name in _SAME}}
"""Former fields of phases.finetune, and their names in its section optim."""


def former_notes(section: Mapping[str, Any]) -> list[str]:
    """A line for each field of the "mpl_scale" section that has another name now."""
    where = "mpl_scale.phases.finetune"
    given = [key for key in FINETUNE if key in _below(section, "phases", "finetune")]
    return [f"{where}.{key} is now {where}.optim.{FINETUNE[key]}: rename it" for key in given]


def without_former_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """The "mpl_scale" section of a JSON file without them.

    Raises:
        ValueError: what they ask for is gone, or given under both names; names the field and the fix.
    """
    found = renamed(section)
    if feedback := _below(found, "method", "feedback"):
        found["method"] = {**found["method"], "feedback": _feedback(feedback)}
    return found


def renamed(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with the names of this version. ValueError: a field is given under both names."""
    finetune = _below(section, "phases", "finetune")
    former = {FINETUNE[key]: value for key, value in finetune.items() if key in FINETUNE}
    if not former:
        return dict(section)
    optim = _below(finetune, "optim")
    if twice := former.keys() & optim.keys():
        new = min(twice)
        old = next(key for key, name in FINETUNE.items() if name == new)
        raise ValueError(
            f"mpl_scale.phases.finetune.{old} = {finetune[old]} is now mpl_scale.phases.finetune.optim.{new}, which is "
            f"given too, as {optim[new]}; remove the former"
        )
    kept = {key: value for key, value in finetune.items() if key not in FINETUNE}
    return {**section, "phases": {**section["phases"], "finetune": {**kept, "optim": {**optim, **former}}}}


def _below(section: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The section inside, empty where there is none."""
    found: Any = section
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _feedback(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of old_loss and target are what is done now; the port's values of both are the rule kekmodel."""
    former = {key: values[key] for key in PORTS_FEEDBACK if key in values}
    kept = {key: value for key, value in values.items() if key not in former}
    rule, weight = values.get("rule"), values.get("weight", 1.0)
    if former == PORTS_FEEDBACK and rule == "loss_difference" and isinstance(weight, int | float):
        return {**kept, "rule": "kekmodel", "weight": -weight}  # a negative weight gave it the port's sign
    of_port = [key for key, value in former.items() if value == PORTS_FEEDBACK[key]]
    if of_port or (former and rule in (None, "kekmodel")):  # without a rule, a preset may have it
        given = ", ".join(f"mpl_scale.method.feedback.{key} = {value}" for key, value in former.items())
        raise ValueError(
            f"{given}: no longer a field; remove it, or set mpl_scale.method.feedback.rule = kekmodel for all of that "
            "port's feedback (old loss, target and sign)"
        )
    return kept
