"""Fields of earlier versions, in files that users keep and in the configuration that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PORTS_FEEDBACK = {"old_loss": "update_pass", "target": "strong_argmax"}
"""Former fields of method.feedback, as the rule kekmodel has them."""


def without_former_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """The "mpl_scale" section of a JSON file without them.

    Raises:
        ValueError: what they ask for is gone; names the field and the fix.
    """
    method = section.get("method")
    feedback = method.get("feedback") if isinstance(method, Mapping) else None
    if not isinstance(method, Mapping) or not isinstance(feedback, Mapping):
        return dict(section)
    return {**section, "method": {**method, "feedback": _feedback(feedback)}}


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
