"""The "mpl_scale" section of a ds_config: every field, its default, its bounds and its source in the paper.

Models are frozen and refuse unknown keys. Checks across fields and against the world size are in checks.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mpl_scale.config.presets import STRONG_PRESETS, under_preset

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Interpolation = Literal["bilinear", "bicubic"]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


Recompute = Literal["none", "bn_act", "block"]


class Section(BaseModel):
    """Base of every section: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class NetworkConfig(Section):
    """One network: teacher or student."""

    name: str = Field(description="A registered model (mpl_scale.models) or any timm classifier.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout before the classifier.")
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Stochastic depth, deepest block.")
    init: Literal["default", "uniform", "zero_classifier"] = Field(
        "default", description="default: the model's own; uniform: U(-init_range, init_range) everywhere (3.1)."
    )
    init_range: Positive = 0.1
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to the model's builder.")
    weights: str | None = Field(
        None,
        description="Start from this model.safetensors, or the folder that holds it: of mpl-scale export, or any with "
        "the model's own keys.",
    )


class ModelConfig(Section):
    """Both networks and what they share."""

    teacher: NetworkConfig
    student: NetworkConfig
    num_classes: Annotated[int, Field(ge=2)]
    image_size: Count = Field(description="Height and width of the images fed to the networks, pixels.")
    bn_decay: Probability = Field(
        0.99, description="Decay of BN's moving averages (Tables 6-8); torch momentum is 1 - decay."
    )
    bn_eps: Positive = 1e-3


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

    preset: Literal["paper", "released_code"] | None = Field(
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
    num_ops: CountOrZero = Field(2, description="N of RandAugment.")
    magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = Field(
        9.0, description="M of RandAugment, 0 to 10; the released code goes beyond."
    )
    random_magnitude: bool = Field(
        True, description="Draw each magnitude from U(0, magnitude) instead of using it as is."
    )
    magnitude_rule: Literal["distance", "level"] = Field(
        "distance", description="Whether 0 leaves an image alone (distance), or is one end of a range (released code)."
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
    sample_pairing: Probability = Field(0.4, description="Limit of sample_pairing: weight of the other image.")
    cutout_op: Fraction = Field(0.125, description="Limit of the operation cutout: half its square's side, as a share.")
    cutout: CountOrZero = Field(
        0, description="Side of the square set to `fill` after the operations, pixels; 0: none."
    )
    crop_pad: CountOrZero = Field(0, description="At the end, shift by up to so many pixels each way; 0: no shift.")
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
        low, high = self.probability_range or (0.0, 1.0)
        if low > high:
            raise ValueError(f"probability_range = {[low, high]} is upside down; give the smaller one first")
        return self


class DataConfig(Section):
    """Where images come from and how they are split, viewed and batched."""

    source: str = Field(
        "digits", description="Registered: digits, folder, tfrecord, webdataset, cifar10, svhn, arrays."
    )
    root: str | None = Field(None, description="Folder of the data set; digits: where its PNG files are written.")
    index: str | None = Field(
        None, description="An index built by mpl-scale index; null: built at the first run where the source needs one."
    )
    unlabelled_index: str | None = Field(
        None,
        description="An index, as of mpl-scale select, whose images are the unlabelled ones; null: those of the split.",
    )
    distributions: str | None = Field(
        None,
        description="What a trained teacher says of each image, as of mpl-scale distributions: float [N, K] by sample "
        "id, for methods reduced_mpl and noisy_student.",
    )
    label_offset: int | None = Field(
        None, description="The first class's label in the files; null: the format's custom (tfrecord 1, others 0)."
    )
    check_data: bool = Field(True, description="Whether TFRecord data are compared with their checksum when indexed.")
    split: str = Field(
        "stratified",
        description="Registered: stratified, test_files (the source's own test part), and those of C.1: cifar10_4k, "
        "svhn_1k, imagenet_10; all_labelled (3.3, section 4).",
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
        "rest for the splits of C.1, training for others.",
    )
    unlabelled_ratio: Count = Field(1, description="mu: unlabelled images per labelled image in a step.")
    labelled_view: Literal["weak", "strong"] = Field(
        "weak", description="How labelled images are seen in training; strong: RandAugment as a baseline (Table 10)."
    )
    weak: WeakConfig = WeakConfig()
    strong: StrongConfig = StrongConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_bad_fraction: Share = Field(
        0.01, description="Of the images indexed, or drawn so far: more unreadable ones than that end the run."
    )
    max_pixels: Count = Field(50_000_000, description="Larger images are bad: a small file may unpack to gigabytes.")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    threads: Count = Field(1, description="DALI's CPU threads per rank.")
    prefetch: Count = Field(2, description="Batches DALI prepares ahead.")
    evaluation_batch: Count = Field(256, description="Images per data rank and evaluation step.")


class FeedbackConfig(Section):
    """The student's feedback h (equation 12, appendix C.3)."""

    rule: str = Field(
        "cosine", description="Registered: cosine, dot, loss_difference, none, flipped, per_sample, soft_exact."
    )
    weight: float = Field(1.0, description="Multiplies h after the baseline is subtracted.")
    dropout: bool = Field(False, description="Whether the student's feedback passes drop anything.")
    old_loss: Literal["own_pass", "update_pass"] = Field(
        "own_pass",
        description="Rule loss_difference: CE_old from a pass over x_l alone, as CE_new, or from the update pass, "
        "where x_s shares the batch norm (the released code and its ports; mostly noise).",
    )
    target: Literal["pseudo_labels", "strong_argmax"] = Field(
        "pseudo_labels",
        description="What the teacher's fed-back CE is against; strong_argmax only to compare with a port.",
    )
    baseline: bool = Field(True, description="Subtract a moving average of h (C.3).")
    baseline_decay: Probability = 0.99
    baseline_bias_correction: bool = Field(True, description="Divide the average by 1 - decay**t, as Adam does.")


class UDAConfig(Section):
    """Unsupervised data augmentation: the teacher's consistency loss (Table 7)."""

    weight: NonNegative = Field(1.0, description="UDA factor.")
    temperature: Positive = Field(0.7, description="Sharpens the weak view's distribution.")
    threshold: Probability = Field(0.0, description="Only images whose sharpened confidence reaches it count.")
    labelled_threshold: Probability = Field(
        1.0, description="Labelled images whose class has a larger probability do not count (C.4); 1: all count."
    )
    ramp_steps: CountOrZero = Field(0, description="Linear ramp of the weight: weight * min(1, step / ramp_steps).")


class MethodConfig(Section):
    """What a step does."""

    name: str = Field(
        "mpl", description="Registered: supervised, mixup, pseudo_label, noisy_student, uda, mpl, reduced_mpl."
    )
    preset: Literal["paper", "released_code", "kekmodel_compat"] | None = Field(
        None, description="Sets the fields below that are not given: see mpl_scale/config/presets.py."
    )
    pseudo_labels: Literal["sampled", "argmax", "soft"] = "sampled"
    pseudo_label_view: Literal["weak", "strong"] = Field("weak", description="The view of x_u the teacher labels.")
    pseudo_label_temperature: Positive = 1.0
    pseudo_label_threshold: Probability = Field(
        0.95, description="Methods pseudo_label and noisy_student, and that teacher_loss: least confidence (Table 6)."
    )
    feedback: FeedbackConfig = FeedbackConfig()
    teacher_loss: str = Field(
        "uda",
        description="Registered: uda, supervised, mixup, pseudo_label. What the teacher follows beside the "
        "feedback and in its warm-up (Table 10); its part on unlabelled images has the weight uda.weight.",
    )
    mixup_alpha: Positive = Field(1.0, description="mixup: lambda ~ Beta(alpha, alpha).")
    supervised_weight: NonNegative = Field(1.0, description="Weight of the teacher's CE on labelled images.")
    uda: UDAConfig = UDAConfig()
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    student_label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Smooths the pseudo labels."
    )
    student_sees_labelled: bool = Field(True, description="The student's pass includes x_l, for BN statistics only.")
    student_wait_steps: CountOrZero = Field(0, description="Steps with student learning rate 0 and feedback 0.")
    ema_decay: Probability = Field(0.999, description="Student EMA: rate min(decay, (t+1)/(t+10)); 0: none.")


class OptimConfig(Section):
    """Optimiser and schedule of one network."""

    name: str = Field("sgd", description="Registered: sgd, rmsprop, lars.")
    lr: NonNegative
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = Field(0.0, description="Coupled L2, as in the released code.")
    decay_bn_and_bias: bool = Field(False, description="Whether weight decay covers BN parameters and biases.")
    rho: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="RMSProp: decay of the squared gradient.")
    eps: Positive = Field(1e-3, description="RMSProp: added under the root (TF variant).")
    trust: Positive = Field(1e-3, description="LARS: eta, a parameter's step as a share of its norm at lr 1.")
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    warmup_steps: CountOrZero = Field(0, description="Linear: lr * (step + 1) / warmup_steps.")
    decay_rate: Fraction = Field(0.97, description="Exponential schedule: lr * rate**floor(step / decay_steps).")
    decay_steps: Count = Field(750, description="Exponential schedule.")


class OptimsConfig(Section):
    """One optimiser per network."""

    teacher: OptimConfig
    student: OptimConfig


class ParallelConfig(Section):
    """Mesh and engine."""

    engine: Literal["auto", "deepspeed", "flat"] = Field(
        "auto", description="auto: flat for ZeRO 0-2 on a GPU, deepspeed otherwise."
    )
    width: Count = Field(1, description="Ranks that share one image along its width.")
    switch_at: str = Field(
        "auto",
        description="Where a split network goes over to whole images of fewer rows: auto (the first stage that a rank "
        "enters with fewer columns than a kernel has), never, or the path of a stage.",
    )
    empty_slices: bool = Field(
        True, description="Whether ranks may own no column where images are narrow; false refuses such a width."
    )
    halo: Literal["plain", "block_input"] = Field(
        "plain",
        description="What neighbours exchange: the input of each convolution (plain), or of each block, whose first "
        "convolution is then repeated on the halo (block_input: fewer bytes).",
    )
    teacher: Literal["auto", "live", "deferred"] = Field(
        "auto",
        description="live: the teacher's graph is kept while the student learns; deferred: the teacher runs again, "
        "with a graph, once the feedback is known (one forward pass more, no graph kept). auto: deferred with gradient "
        "accumulation.",
    )
    kernels: Literal["auto", "eager", "compiled"] = Field(
        "auto",
        description="Batch norm with its activation: as torch operators, or compiled into single loops that keep only "
        "their input. auto: compiled on a GPU.",
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        "auto", description="Layout of the images; auto: on on a GPU where images are whole (width 1)."
    )
    recompute: Recompute | list[Recompute] = Field(
        "none",
        description="Activations recomputed in the backward pass: none, all but each block's input and dense "
        "convolutions (bn_act), or all but each block's input (block). A list gives one for each stage of the network.",
    )
    recompute_backend: Literal["native", "fairscale"] = Field(
        "native", description="Who recomputes; fairscale's is for whole blocks, outside CUDA graphs."
    )
    recompute_offload: bool = Field(False, description="fairscale: keep the blocks' inputs in the host's memory.")
    shard_size: Count | None = Field(None, description="Consecutive ranks that share one copy of the state; null: all.")
    graph: Literal["off", "auto", "required"] = Field("auto", description="Replay the step as one CUDA graph.")
    timeout_seconds: Positive = Field(600.0, description="A collective that takes longer ends the run.")


class TrainPhase(Section):
    """The main phase."""

    steps: Count
    evaluate_every: CountOrZero = Field(0, description="0: only at the end of the phase.")


class WarmupPhase(Section):
    """Teacher warm-up: supervised + UDA on the teacher alone, before the main phase."""

    steps: CountOrZero = 0


class FinetunePhase(Section):
    """Finetuning of the student on labelled images, fixed learning rate (3.2, 3.3; LARS in section 4)."""

    steps: CountOrZero = 0
    optimizer: str = Field("sgd", description="Registered: sgd, rmsprop, lars (section 4, C.4).")
    lr: NonNegative = 1e-5
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 0.0
    rho: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="RMSProp, as in mpl_scale.optim.")
    eps: Positive = Field(1e-3, description="RMSProp, as in mpl_scale.optim.")
    trust: Positive = Field(1e-3, description="LARS, as in mpl_scale.optim.")
    batch_size: Count | None = Field(None, description="Global labelled batch; null: train_batch_size.")
    start_from: Literal["student", "ema"] = "student"


class PhasesConfig(Section):
    """In order: teacher warm-up, train, finetune."""

    teacher_warmup: WarmupPhase = WarmupPhase()
    train: TrainPhase
    finetune: FinetunePhase = FinetunePhase()


class LoggingConfig(Section):
    """What is written while training."""

    every: Count = Field(10, description="Steps between lines of metrics.jsonl.")
    progress: Literal["auto", "bar", "lines", "off"] = Field(
        "auto", description="auto: a bar on a terminal, else lines."
    )


class CheckpointConfig(Section):
    """When the state is saved and what is kept."""

    every: CountOrZero = Field(1000, description="Steps between checkpoints; 0: only at the end and on SIGTERM.")
    keep: Count = Field(3, description="Newest checkpoints kept.")
    keep_every: CountOrZero = Field(
        0, description="Checkpoints of steps that it divides are kept too, for good; a multiple of `every`; 0: none."
    )
    asynchronous: bool = Field(
        False, description="Copy the state to the host's memory and write it while training goes on."
    )
    timeout_seconds: Positive = Field(
        600.0, description="asynchronous: where a rank's file is not written by then, the checkpoint is given up."
    )

    @model_validator(mode="after")
    def _keep_some(self) -> Self:
        if self.every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every = {self.keep_every} is no multiple of every = {self.every}; use a multiple, or 0"
            )
        return self


class GuardConfig(Section):
    """What ends a run that goes on without getting anywhere."""

    hang_seconds: Positive | None = Field(
        None,
        description="No step ended for that long: every rank leaves its stacks, the one that is behind is named, and "
        "the run ends with status 75. Above the slowest step, below parallel.timeout_seconds; null: off.",
    )
    nonfinite: Literal["off", "stop"] = Field(
        "stop",
        description="A metric (at logging steps) or weight (before checkpoints) that is NaN or infinite: stop, with "
        "the state saved in bad-<step>, where no resume looks.",
    )


class Config(Section):
    """The "mpl_scale" section."""

    paper: str | None = Field(None, description="The row of the paper this config stands for.")
    imports: list[str] = Field(
        [], description="Your own modules (package.module), imported first: what they register can be named here."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimsConfig
    parallel: ParallelConfig = ParallelConfig()
    phases: PhasesConfig
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
