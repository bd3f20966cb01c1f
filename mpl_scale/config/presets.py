"""Named settings of the method: the paper's, the released code's, and those of a popular port.

A preset fills the fields of "mpl_scale.method" that the config leaves out; what the config gives wins. Differences
between the three and why they exist: FIDELITY in docs.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Algorithm 1 with appendix C.3: sampled hard labels, cosine feedback, moving-average baseline.
    "paper": {
        "pseudo_labels": "sampled",
        "pseudo_label_view": "weak",
        "feedback": {"rule": "cosine", "weight": 1.0, "baseline": True, "baseline_bias_correction": True},
    },
    # Soft labels from the strong view, uncorrected baseline of decay 0.99, feedback measured with dropout. Its MPL
    # term has no gradient at all (google-research issues 534 and 541), which `rule: none` states openly.
    "released_code": {
        "pseudo_labels": "soft",
        "pseudo_label_view": "strong",
        "student_label_smoothing": 0.15,
        "label_smoothing": 0.15,
        "feedback": {"rule": "none", "baseline": True, "baseline_decay": 0.99, "baseline_bias_correction": False},
        "uda": {"temperature": 0.7, "threshold": 0.6, "weight": 8.0, "ramp_steps": 5000},
        "student_wait_steps": 3000,
        "ema_decay": 0.995,
    },
    # Argmax labels, the loss difference with the wrong sign on the strong view's own labels, no baseline.
    "kekmodel_compat": {
        "pseudo_labels": "argmax",
        "pseudo_label_view": "weak",
        "feedback": {
            "rule": "loss_difference",
            "weight": -1.0,
            "baseline": False,
            "dropout": True,
            "target": "strong_argmax",
        },
    },
}


def apply_preset(method: dict[str, Any]) -> dict[str, Any]:
    """The method section with its preset's values under its own."""
    preset = PRESETS.get(method.get("preset") or "", {})
    return _merge(preset, method)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if nested else value
    return merged
