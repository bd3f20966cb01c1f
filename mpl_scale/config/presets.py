"""Named settings of the method: the paper's, ours with the exact feedback, the released code's, and a popular port's.

A preset fills the fields of "mpl_scale.method" that the config leaves out; what the config gives wins. Differences
between them and why they exist: FIDELITY in docs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Algorithm 1 with appendix C.3: sampled hard labels, cosine feedback, moving-average baseline.
    "paper": {
        "pseudo_labels": "sampled",
        "pseudo_label_view": "weak",
        "feedback": {"rule": "cosine", "weight": 1.0, "baseline": True, "baseline_bias_correction": True},
    },
    # Soft labels and the exact gradient of equation 3, at a size that smoothing does not change.
    "exact": {
        "pseudo_labels": "soft",
        "pseudo_label_view": "weak",
        "feedback": {"rule": "soft_exact", "normalise": "credits", "weight": 0.3},
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
    # Argmax labels, no baseline, and a feedback of its own: mpl_scale/mpl/kekmodel.py.
    "kekmodel_compat": {
        "pseudo_labels": "argmax",
        "pseudo_label_view": "weak",
        "feedback": {"rule": "kekmodel", "baseline": False, "dropout": True},
    },
}


STRONG_PRESETS: dict[str, dict[str, Any]] = {
    # Table 5. The paper gives neither N nor M; they stay at this section's defaults, RandAugment's for ImageNet.
    "paper": {"op_set": "cifar10"},
    # CIFAR-10's strong view there: N = 2 at level 16 of 10, cutout of half the side, and a second crop and flip.
    "released_code": {
        "op_set": "released_code",
        "num_ops": 2,
        "magnitude": 16.0,
        "random_magnitude": False,
        "magnitude_rule": "level",
        "probability_range": [0.2, 0.8],
        "translate": 0.125,
        "cutout_op": 0.125,
        "cutout": 16,
        "crop_pad": 4,
        "flip": True,
        "fill": 128,
    },
    # ImageNet's policy (Cubuk et al. 2019, Table 9), on grey as there.
    "autoaugment": {"policy": "autoaugment", "magnitude_rule": "autoaugment", "fill": 128},
}
"""Of "mpl_scale.data.strong"."""


def under_preset(section: dict[str, Any], presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A section with its preset's values under its own; `ops` that are given stand instead of the preset's `op_set`."""
    name = section.get("preset")
    preset = dict(presets.get(name, {})) if isinstance(name, str) else {}
    if section.get("ops"):
        preset.pop("op_set", None)
    return merge(preset, section)


def apply_preset(method: dict[str, Any]) -> dict[str, Any]:
    """The method section with its preset's values under its own."""
    name = method.get("preset")
    return merge(PRESETS.get(name, {}) if isinstance(name, str) else {}, method)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two sections recursively; where both have a value, `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if nested else value
    return merged


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a section and of those in it, by dotted field; a list is a value, and so is an empty section."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
