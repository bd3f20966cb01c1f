"""Sections below mpl_scale.data that say how an image is seen: weakly, strongly, in evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mpl_scale.config.presets import STRONG_PRESETS, under_preset
from mpl_scale.config.section import (
    CountOrZero,
    Fraction,
    Positive,
    Probability,
    Section,
    Share,
    refuse_upside_down,
)

Interpolation = Literal["bilinear", "bicubic"]
_OF_RANDAUGMENT = ("ops", "op_set", "num_ops", "magnitude", "random_magnitude", "probability", "probability_range")
"""What a policy has instead, each by its own table."""


class WeakConfig(Section):
    """The weak view: a crop, then a flip."""

    kind: str = Field("shift_crop", description="Registered: shift_crop, random_resized_crop.")
    scale: tuple[Share, Share] = Field(
        (0.08, 1.0), description="random_resized_crop: least and largest share of the image's area."
    )
    ratio: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3), description="random_resized_crop: least and largest width / height of the part."
    )
    interpolation: Interpolation = Field("bilinear", description="Of resizing, with an antialiasing filter.")
    pad: CountOrZero = Field(0, description="shift_crop: pixels the window may leave the image by on each side.")
    fill: Annotated[int, Field(ge=0, le=255)] = Field(0, description="Value of pixels outside the image.")
    flip: bool = Field(False, description="Horizontal flip with probability 1/2; wrong for digits (C.2).")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        refuse_upside_down("scale", *self.scale)
        refuse_upside_down("ratio", *self.ratio)
        return self


class EvaluationConfig(Section):
    """How test images are seen."""

    kind: str = Field("resize", description="Registered: resize (the whole image), center_crop (as timm evaluates).")
    crop_pct: Share = Field(
        0.875, description="center_crop: image_size over the shorter side before the crop; timm's default."
    )
    interpolation: Interpolation = Field("bilinear", description="Of resizing, with an antialiasing filter.")


class StrongConfig(Section):
    """The strong view: `num_ops` operations drawn uniformly (RandAugment), then cutout, on top of the weak view.

    Limits are what an operation reaches at magnitude 10; their defaults are AutoAugment's, to which Table 5 refers.
    """

    preset: Literal["paper", "released_code", "autoaugment"] | None = Field(
        None, description="Sets the fields below that are not given: see mpl_scale/config/presets.py."
    )
    op_set: str | None = Field(
        None,
        description="A named list of operations: cifar10, imagenet, svhn (Table 5), released_code, no_pairing (Table 5 "
        "without Sample Pairing); null: no_pairing, or `ops`.",
    )
    ops: list[str] = Field(
        default_factory=list, description="Names registered in mpl_scale.augment, instead of an op_set."
    )
    policy: str | None = Field(
        None,
        description="Registered: autoaugment (ImageNet's). A sub-policy is drawn for each image, and has operations, "
        "probabilities and levels of its own; null: RandAugment, as the other fields say.",
    )
    num_ops: Annotated[int, Field(ge=0, le=16)] = Field(2, description="N of RandAugment.")
    magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = Field(
        9.0, description="M of RandAugment, 0 to 10; the released code goes beyond."
    )
    random_magnitude: bool = Field(
        True, description="Draw each magnitude from U(0, magnitude) instead of using it as is."
    )
    magnitude_rule: Literal["distance", "level", "autoaugment"] = Field(
        "distance",
        description="Whether 0 leaves an image alone (distance), or is one end of a range: the released code's "
        "(level), or AutoAugment's.",
    )
    probability: Probability = Field(1.0, description="Of applying each drawn operation.")
    probability_range: Annotated[tuple[Probability, Probability], Field(strict=False)] | None = Field(
        None, description="Draw one probability for all operations of an image from U(low, high) instead."
    )
    enhance: Positive = Field(0.9, description="Limit of brightness, color, contrast, sharpness: factor 1 +- enhance.")
    posterize: Annotated[int, Field(ge=1, le=8)] = Field(4, description="Limit of posterize: bits dropped.")
    rotate: Annotated[float, Field(gt=0.0, le=180.0)] = Field(30.0, description="Limit of rotate, degrees.")
    shear: Annotated[float, Field(gt=0.0, le=2.0)] = Field(0.3, description="Limit of shear_x and shear_y.")
    translate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        100 / 331, description="Limit of translate_x and translate_y, share of the side: 100 of 331 pixels."
    )
    sample_pairing: Probability = Field(0.4, description="Largest weight of the other image in sample_pairing.")
    cutout_op: Fraction = Field(0.125, description="Limit of the operation cutout: half its square's side, as a share.")
    cutout: CountOrZero = Field(
        0, description="Side of the square set to `fill` after the operations, pixels; 0: none."
    )
    crop_pad: CountOrZero = Field(0, description="At the end, shift by up to this many pixels each way; 0: no shift.")
    flip: bool = Field(False, description="At the end, flip horizontally with probability 1/2.")
    fill: Annotated[int, Field(ge=0, le=255)] = Field(
        0, description="Value of pixels that come from outside the image."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        """The preset's values under what is given; a preset whose name is wrong is left to the field's own check."""
        return under_preset(given, STRONG_PRESETS) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.ops and self.op_set:
            raise ValueError(f"ops and op_set = {self.op_set!r} both say what to draw from; leave one out")
        refuse_upside_down("probability_range", *(self.probability_range or (0.0, 1.0)))
        if self.policy is not None:
            fields = StrongConfig.model_fields
            given = [
                name
                for name in _OF_RANDAUGMENT
                if getattr(self, name) != fields[name].get_default(call_default_factory=True)
            ]
            if given:
                raise ValueError(
                    f"policy = {self.policy!r} has its own operations, probabilities and levels; leave out "
                    f"{', '.join(given)}"
                )
            if self.magnitude_rule != "autoaugment":
                raise ValueError(
                    f"policy = {self.policy!r} with magnitude_rule = {self.magnitude_rule!r}: its levels are of rule "
                    "autoaugment; set that, or preset = autoaugment"
                )
        return self
