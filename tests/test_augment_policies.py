"""AutoAugment's policy is the published table, which timm has too, and gives the images that PIL gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, AugmentOp, auto_augment_policy_original

from mpl_scale.augment import OPS, StrongView, find_ops
from mpl_scale.augment.policies import POLICIES
from mpl_scale.config.schema import StrongConfig

PRESET = StrongConfig(preset="autoaugment")
POLICY = POLICIES["autoaugment"]
NAMES = {"PosterizeOriginal": "posterize", "ShearX": "shear_x"}
SIZE = (24, 20)
PUBLISHED: list[list[AugmentOp]] = auto_augment_policy_original({"img_mean": (128, 128, 128)})


def steps() -> Iterator[tuple[int, int, AugmentOp]]:
    for row, sub_policy in enumerate(PUBLISHED):
        for number, step in enumerate(sub_policy):
            yield row, number, step


def test_the_table_is_the_published_one() -> None:
    assert POLICY.which.shape == (25, 2)
    for row, number, step in steps():
        name = POLICY.ops[POLICY.which[row, number]]
        assert name == NAMES.get(step.name, step.name.lower())
        assert POLICY.probability[row, number] == step.prob
        amount = OPS[name].amount
        if LEVEL_TO_ARG[step.name] is None:
            assert amount is None
        else:
            assert amount is not None
            (found,) = amount(POLICY.strength[row, number : number + 1], PRESET, SIZE)
            assert found == pytest.approx(abs(step.level_fn(step.magnitude, step.hparams)[0]), abs=1e-12)


def outcomes(image: Image.Image) -> dict[bytes, float]:
    """Every image that the published policy can make of one, with its probability."""

    def images_of(image: Image.Image, step: AugmentOp) -> Iterator[tuple[Image.Image, float]]:
        yield image, 1 - step.prob
        function, level = NAME_TO_OP[step.name], LEVEL_TO_ARG[step.name]
        if level is None:
            yield function(image), step.prob
            return
        amount = abs(level(step.magnitude, step.hparams)[0])
        if step.name in ("Color", "Contrast", "Sharpness"):
            amount = round(amount * 4096) / 4096  # as all of our enhancers
        signs = (-1, 1) if step.name in ("Rotate", "ShearX") else (1,)
        for sign in signs:
            changed = function(image, sign * amount, fillcolor=(128,) * 3, resample=Image.Resampling.NEAREST)
            yield changed, step.prob / len(signs)

    found: dict[bytes, float] = defaultdict(float)
    for first, second in PUBLISHED:
        for seen, share in images_of(image, first):
            for result, own in images_of(seen, second):
                if share * own:
                    found[result.tobytes()] += share * own / len(PUBLISHED)
    return found


def test_views_are_those_of_the_published_policy_as_often() -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (*SIZE, 3), np.uint8)
    expected, count = outcomes(Image.fromarray(pixels)), 20_000
    assert sum(expected.values()) == pytest.approx(1)
    images = torch.from_numpy(pixels).permute(2, 0, 1).expand(count, -1, -1, -1)
    view = StrongView(PRESET, seed=0, stream=0)
    result = view(images, np.arange(count), np.zeros(count, np.int64)).permute(0, 2, 3, 1).numpy()
    found: dict[bytes, int] = defaultdict(int)
    for one in result:
        found[one.tobytes()] += 1
    assert found.keys() <= expected.keys(), "an image that the published policy cannot make"
    for key, share in expected.items():
        error = np.sqrt(count * share * (1 - share))
        assert abs(found[key] - count * share) <= 5 * error + 1  # 5 deviations, of some 150 outcomes


def test_fixed_shapes_give_the_same_bytes() -> None:
    ids, epochs = np.arange(200), np.zeros(200, np.int64)
    images = torch.randint(256, (200, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = StrongView(PRESET, seed=3, stream=1)
    assert view.static is not None
    parameters = view.parameters(ids, epochs, size=SIZE, device=images.device)
    assert torch.equal(view(images, ids, epochs), view.static(images, parameters))


def test_a_policy_allows_no_other_choice() -> None:
    assert [op.name for op in find_ops(PRESET)] == list(POLICY.ops)
    assert StrongConfig.model_validate_json(PRESET.model_dump_json()) == PRESET
    for given in ({"magnitude": 5.0}, {"ops": ["invert"]}, {"op_set": "svhn"}, {"num_ops": 3}):
        with pytest.raises(ValueError, match=f"levels; leave out {next(iter(given))}"):
            StrongConfig(preset="autoaugment", **given)
    with pytest.raises(ValueError, match="magnitude_rule = 'distance': its levels are of rule autoaugment"):
        StrongConfig(policy="autoaugment")
    with pytest.raises(ValueError, match=r"strong\.policy = 'autoaugmen' is unknown; did you mean autoaugment"):
        find_ops(StrongConfig(policy="autoaugmen", magnitude_rule="autoaugment"))
