"""The section mpl_scale.data: where images come from, how they are split, viewed and batched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mpl_scale.config.schema_views import EvaluationConfig, StrongConfig, WeakConfig
from mpl_scale.config.section import Count, CountOrZero, Fraction, NonNegative, Section, Share


class PlaceConfig(Section):
    """The long form of a path in `labelled`, `unlabelled`, `validation` or `test`."""

    root: str = Field(description="A folder of images, of shards, or an index.")
    source: str | None = Field(None, description="As mpl_scale.data.source; null: the one whose files are found there.")
    label_offset: int | None = Field(None, description="As mpl_scale.data.label_offset, of this place.")


Place = str | PlaceConfig


class DataConfig(Section):
    """Where images come from and how they are split, viewed and batched."""

    source: str = Field(
        "digits",
        description="Registered: digits, folder, tfrecord, webdataset, parquet and arrow (Hugging Face), cifar10, "
        "cifar100, svhn, stl10, idx (MNIST), arrays, table (CSV); two_moons, of vectors; synthetic: random images for "
        "any configuration, whatever else it says of its data.",
    )
    root: str | None = Field(None, description="Folder of the data set; digits: where its PNG files are written.")
    index: str | None = Field(
        None, description="An index built by mpl-scale index; null: built at the first run where the source needs one."
    )
    unlabelled_index: str | None = Field(
        None,
        description="An index, as of mpl-scale select, whose images are the unlabelled ones; null: those of the split.",
    )
    labelled: Place | None = Field(
        None,
        description="Labelled images that lie apart from the others, all of them, instead of `root`: a folder of class "
        "folders, of any source's files, or an index. The classes are theirs.",
    )
    unlabelled: Place | list[Place] | None = Field(
        None, description="Beside `labelled`: images without labels, in one place or several; nested to any depth."
    )
    validation: Place | None = Field(
        None, description="Beside `labelled`: held out; evaluated on where there is no test part."
    )
    test: Place | None = Field(
        None,
        description="Beside `labelled`: evaluated on. null: the test part of `labelled`, or `validation`, or a share "
        "test_fraction of `labelled`.",
    )
    distributions: str | None = Field(
        None,
        description="What a trained teacher says of each image, as of mpl-scale distributions: float [N, K] by sample "
        "id, for methods reduced_mpl and noisy_student.",
    )
    label_offset: int | None = Field(
        None,
        description="The first class's label in the files; null: the format's custom (tfrecord 1; webdataset, "
        "parquet, arrow, arrays, idx, table 0), or what `index` was built with.",
    )
    check_data: bool | None = Field(
        None, description="Whether TFRecord data are compared with their checksum when indexed; null: yes."
    )
    split: str = Field(
        "stratified",
        description="Registered: stratified, test_files (the source's own test part), and those of C.1: cifar10_4k, "
        "svhn_1k, imagenet_10; all_labelled (3.3, section 4); transductive (3.1). Without effect beside `labelled`.",
    )
    evaluate_on: Literal["test", "held_out"] = Field(
        "test", description="held_out: the images that a split of C.1 keeps for tuning, instead of the test part."
    )
    labelled_fraction: Fraction = Field(0.1, description="imagenet_10: labelled share of the training shards.")
    held_out_shards: CountOrZero = Field(
        20, description="imagenet_10, all_labelled: last training shards, kept for tuning (C.1)."
    )
    labelled_per_class: Count = Field(4, description="Labelled training images per class.")
    test_fraction: Fraction = Field(
        0.3333, description="Share held out for evaluation, stratified; nothing trains on it."
    )
    split_seed: int | None = Field(None, description="Seed of the split; null: the run's seed.")
    unlabelled_from: Literal["auto", "training", "rest", "labelled"] = Field(
        "auto",
        description="Unlabelled images: all training images, those without a label, or the labelled ones (D.2); auto: "
        "rest for the splits of C.1 and for `unlabelled`, training for others.",
    )
    unlabelled_ratio: Count = Field(1, description="mu: unlabelled images per labelled image in a step.")
    labelled_view: Literal["weak", "strong"] = Field(
        "weak", description="How labelled images are seen in training; strong: RandAugment as a baseline (Table 10)."
    )
    weak: WeakConfig = WeakConfig()
    strong: StrongConfig = StrongConfig()
    jitter: NonNegative = Field(
        0.0, description="Standard deviation of the noise that is the strong view of vectors (two_moons)."
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    synthetic_images: Count = Field(
        1024, description="synthetic: images of each part, labelled, unlabelled, held out and evaluated on."
    )
    max_bad_fraction: Share = Field(
        0.01, description="Of the images indexed, or drawn so far: more unreadable ones than that end the run."
    )
    allow_damaged_shards: bool = Field(
        False,
        description="Whether shards that are cut short or damaged are used as far as they can be read, and numbers "
        "may be missing among theirs; what is lost counts as one unreadable image each. false refuses them.",
    )
    max_pixels: Count = Field(
        50_000_000, le=1 << 31, description="Larger images are bad: a small file may unpack to gigabytes."
    )
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="A value for each of model.in_chans, of 0 to 1.")
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), description="As `mean`.")
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="DALI's CPU threads per rank.")
    prefetch: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Batches DALI prepares ahead.")
    resident: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether images are decoded once, at the start, and stay in the device's memory, where their views "
        "are made: the same batches bit for bit, without the host. Needs the weak view shift_crop. auto: on where all "
        "images have one size of at most 96 x 96 and fit in resident_bytes.",
    )
    resident_bytes: Count = Field(
        1 << 31, description="Most bytes that resident images, the test part's included, may take on a rank."
    )
    evaluation_batch: Count = Field(256, description="Images per data rank and evaluation step.")

    @property
    def decoded_channels(self) -> int:
        """Channels of images from reading until they are normalised: 3, which are one where images are grey."""
        return 3 if len(self.mean) == 1 else len(self.mean)

    @property
    def is_synthetic(self) -> bool:
        """Whether images are made up, and nothing is read that names any."""
        return self.source == "synthetic"

    @property
    def is_apart(self) -> bool:
        """Whether images lie in places of their own, of `labelled` and others."""
        return self.labelled is not None and not self.is_synthetic
