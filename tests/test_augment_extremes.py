"""No operation of a config's strong view, at the ends of what it can be drawn with, loses the image it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpl_scale.augment import OPS, Given, StrongView, find_ops
from mpl_scale.config import load_config
from mpl_scale.config.schema import StrongConfig
from mpl_scale.data.vectors import LENGTHS
from tests.support.configs import DIGITS

MAX_MAGNITUDE = 10
IDS, EPOCHS = np.arange(12, dtype=np.int64), np.zeros(12, np.int64)
UNCHANGED = {("posterize", 27.0, "level")}
"""Operations that leave the image alone at the config's largest magnitude, each with a line in docs/fidelity.md."""


def policy_of(path: Path) -> tuple[str, int] | None:
    """A config's strong view and image size; None: it has none."""
    config = load_config(path).mpl
    if not config.data.strong.num_ops or config.data.source in LENGTHS:
        return None
    return json.dumps(config.data.strong.model_dump(), sort_keys=True), config.model.image_size


def policies() -> dict[str, tuple[str, int]]:
    """The policies of ds_configs, each under the first config that has it."""
    found: dict[tuple[str, int], str] = {}
    for path in sorted(DIGITS.parent.glob("*.json")):
        if (policy := policy_of(path)) is not None:
            found.setdefault(policy, path.stem)
    return {name: policy for policy, name in found.items()}


POLICIES = policies()
CASES = [
    (name, op.name) for name, (strong, _) in POLICIES.items() for op in find_ops(StrongConfig(**json.loads(strong)))
]


def policy(name: str, **changes: Any) -> StrongConfig:
    return StrongConfig(**{**json.loads(POLICIES[name][0]), "preset": None, **changes})


def pictures(size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two smooth colour images of levels 20 to 230, uint8 [count, 3, size, size], the second the first turned round."""
    place = torch.linspace(0, 3, size, dtype=torch.float64)
    phase = torch.arange(3.0)[:, None, None]
    wave = torch.sin(place[:, None] * 2 + phase) + torch.cos(place * 3 - phase + place[:, None])
    image = (20 + 210 * (wave - wave.min()) / (wave.max() - wave.min())).to(torch.uint8)
    return image.expand(count, -1, -1, -1).clone(), image.flip(1, 2).expand(count, -1, -1, -1).clone()


def test_the_policies_of_the_large_configs_are_among_them() -> None:
    for name in ("b6_wide", "b7_noisy_student", "cifar10_4k", "digits", "imagenet10_resnet50", "svhn_1k"):
        assert policy_of(DIGITS.with_name(f"{name}.json")) in POLICIES.values()
    assert POLICIES["b6_wide"] == next(p for n, p in POLICIES.items() if p[1] == 512)  # L2's is the same


@pytest.mark.parametrize(("name", "op"), CASES)
def test_an_operation_at_its_extremes_keeps_the_image(name: str, op: str) -> None:
    config, size = policy(name), POLICIES[name][1]
    ends = [-config.magnitude, config.magnitude] + ([0.0] if config.random_magnitude else [])
    strength = np.array(ends) / MAX_MAGNITUDE
    operation, (images, partners) = OPS[op], pictures(size, len(ends))
    amount = strength if operation.amount is None else operation.amount(strength, config, (size, size))
    given = Given(config.fill, partners, np.full((len(ends), 2), 0.5))
    result = operation(images, amount, given).double()
    assert not (result == partners).flatten(1).all(1).any(), "another image"
    # a picture's own deviation is 50 levels; brightness at 0.1 of it leaves 5
    assert result.flatten(1).std(1).min() > 3, "one colour"
    if operation.pairs:
        assert ((result - images).abs().mean((1, 2, 3)) < (result - partners).abs().mean((1, 2, 3))).all()
    same = (result == images).flatten(1).all(1)[:2]
    too_small = op == "equalize" and size * size < 256  # of so few pixels PIL's equalize changes none
    unchanged = too_small or (op, config.magnitude, config.magnitude_rule) in UNCHANGED
    assert same.all() if unchanged else not same.any()
    if op.startswith(("translate", "shear", "rotate")):
        ones = torch.ones_like(images)
        kept = operation(ones, amount, Given(0)).double().mean((1, 2, 3))
        assert kept.min() >= 0.4, f"of the image {kept.min():.2f} is left"


@pytest.mark.parametrize(("name", "op"), CASES)
def test_both_forms_agree_at_the_largest_magnitude(name: str, op: str) -> None:
    """Grouped by operation and with fixed shapes: equal bytes, both signs drawn."""
    config = policy(name, policy=None, op_set=None, ops=[op], num_ops=1, random_magnitude=False, cutout=0)
    view = StrongView(config, seed=0, stream=0, candidates=IDS)
    images, partners = pictures(min(POLICIES[name][1], 64), len(IDS))
    assert view.static is not None
    parameters = view.parameters(IDS, EPOCHS, size=(images.shape[2], images.shape[3]), device=images.device)
    assert torch.equal(view(images, IDS, EPOCHS, partners), view.static(images, parameters, partners))


@pytest.mark.parametrize("rule", ["distance", "level"])
def test_no_magnitude_makes_an_enhancers_or_a_partners_image(rule: str) -> None:
    """Up to the largest that a config can ask for, 30 of 10."""
    config = StrongConfig(magnitude=30.0, magnitude_rule=rule)
    strength = np.array([-3.0, 3.0])
    for op in ("brightness", "color", "contrast", "sharpness"):
        assert OPS[op].amount(strength, config, (8, 8)).min() >= 1 - config.enhance - 1e-12
    assert OPS["sample_pairing"].amount(strength, config, (8, 8)).tolist() == [0.4, 0.4]
