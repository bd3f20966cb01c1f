"""Checks that need more than one field or the size of the world, made before anything expensive."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from mpl_scale.config.deepspeed_half import refuse_combinations, refuse_without_effect
from mpl_scale.config.layouts import advise
from mpl_scale.config.load import RunConfig
from mpl_scale.config.model_kwargs import refuse_kwargs
from mpl_scale.config.readers import EXACT_RULES, FED_BACK, MIXES
from mpl_scale.config.schema import DataConfig

Engine = Literal["flat", "deepspeed"]


@dataclass(frozen=True)
class Batches:
    """Images in a step: over all ranks (labelled, unlabelled) and in one micro-batch of a data rank."""

    labelled: int
    unlabelled: int
    labelled_per_rank: int
    data_ranks: int
    finetune: int
    micro_batches: int

    def equation(self) -> str:
        """How the labelled batch comes about, for people."""
        accumulation = f"x gradient_accumulation_steps {self.micro_batches} " if self.micro_batches > 1 else ""
        return (
            f"train_batch_size {self.labelled} = train_micro_batch_size_per_gpu {self.labelled_per_rank} "
            f"{accumulation}x data ranks {self.data_ranks}; unlabelled {self.unlabelled}"
        )


def check(config: RunConfig, *, world: int, cuda: bool) -> Batches:
    """Cross-field checks.

    Args:
        config: as loaded.
        world: ranks.
        cuda: whether this run computes on GPUs.

    Returns:
        The batch arithmetic.

    Raises:
        ValueError: names the fields, the values and the fix.
    """
    try:
        return _check(config, world=world, cuda=cuda)
    except _WrongWorld as error:
        advice = advise(config, world=world, fits=lambda other: _fits(other, world=world, cuda=cuda))
        raise ValueError("; ".join(filter(None, (str(error), advice or error.otherwise)))) from None


class _WrongWorld(ValueError):
    """The configuration is for another number of ranks. otherwise: advice where no file beside it is for this one."""

    def __init__(self, message: str, *, otherwise: str = "") -> None:
        super().__init__(message)
        self.otherwise = otherwise


def _fits(config: RunConfig, *, world: int, cuda: bool) -> bool:
    try:
        _check(config, world=world, cuda=cuda)
    except ValueError:
        return False
    return True


def _check(config: RunConfig, *, world: int, cuda: bool) -> Batches:
    refuse_kwargs(config.mpl.model)
    _check_parallel(config, world=world, cuda=cuda)
    _check_method(config)
    _check_data(config)
    batches = _batches(config, world=world)
    method = config.mpl.method
    mixed = method.name if method.name in MIXES else method.teacher_loss
    if mixed in MIXES and batches.labelled_per_rank % 2:
        raise ValueError(
            f"train_micro_batch_size_per_gpu = {batches.labelled_per_rank} with {mixed}, which mixes neighbours: it "
            f"must be even; use {batches.labelled_per_rank + 1}"
        )
    if mixed == "cutmix" and config.mpl.parallel.width > 1:
        raise ValueError(
            f"mpl_scale.parallel.width = {config.mpl.parallel.width} with cutmix, which pastes boxes into whole "
            "images; set width = 1, or use mixup"
        )
    return batches


def zero_stage(config: RunConfig) -> int:
    """zero_optimization.stage, DeepSpeed's default 0. ValueError unless 0 to 3."""
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_optimization.stage = {stage!r}: must be 0, 1, 2 or 3")
    return int(stage)


def choose_engine(wanted: Literal["auto", "flat", "deepspeed"], *, stage: int, cuda: bool) -> tuple[Engine, str]:
    """`parallel.engine`, resolved, and why. stage: of ZeRO; cuda: whether the ranks compute on GPUs."""
    if wanted != "auto":
        return wanted, "as configured"
    if stage == 3:
        return "deepspeed", "auto: only deepspeed shards weights"
    return ("flat", f"auto: ZeRO-{stage} on a GPU") if cuda else ("deepspeed", "auto: flat is chosen on a GPU only")


def choose_derivative(config: RunConfig) -> tuple[Literal["jvp", "difference", "none"], str]:
    """`method.feedback.derivative`, resolved, and why. ValueError for jvp with ZeRO-3."""
    method = config.mpl.method
    wanted, stage = method.feedback.derivative, zero_stage(config)
    if method.name not in FED_BACK or method.feedback.rule not in EXACT_RULES:
        return "none", f"rule {method.feedback.rule} takes none"
    if wanted == "auto":
        return ("difference", "auto: ZeRO-3 gathers weights layer by layer") if stage == 3 else ("jvp", "auto")
    if wanted == "jvp" and stage == 3:
        raise ValueError(
            "mpl_scale.method.feedback.derivative = jvp with zero_optimization.stage = 3, which gathers weights layer "
            "by layer and knows nothing of their derivatives; set difference, or stage 2"
        )
    return wanted, "as configured"


def _check_parallel(config: RunConfig, *, world: int, cuda: bool) -> None:
    parallel, stage = config.mpl.parallel, zero_stage(config)
    for name, size in (("width", parallel.width), ("shard_size", parallel.shard_size or 1)):
        if world % size:
            other = f"; use a divisor of {world}" if world > 1 else ""
            raise _WrongWorld(
                f"mpl_scale.parallel.{name} = {size} does not divide the {world} rank{'s' if world > 1 else ''}{other}",
                otherwise=f"mpl-scale plan --ds_config {config.path} --gpus {world} looks for a layout",
            )
    if parallel.width > config.mpl.model.image_size:
        raise ValueError(
            f"mpl_scale.parallel.width = {parallel.width} ranks for mpl_scale.model.image_size = "
            f"{config.mpl.model.image_size} columns: a rank needs at least one; use width "
            f"{config.mpl.model.image_size} or less"
        )
    if stage == 3 and parallel.graph == "required":
        raise ValueError(
            "mpl_scale.parallel.graph = required with zero_optimization.stage = 3: ZeRO-3 reads the device on the host "
            "in every forward and backward, which a CUDA graph forbids; use stage 2, or graph off"
        )
    if stage == 3 and parallel.engine == "flat":
        raise ValueError(
            "mpl_scale.parallel.engine = flat with zero_optimization.stage = 3: the flat engine shards gradients and "
            "optimiser state, not weights; use stage 2, or engine deepspeed"
        )
    engine, _ = choose_engine(parallel.engine, stage=stage, cuda=cuda)
    refuse_without_effect(config.deepspeed, flat=engine == "flat")
    if engine == "deepspeed":
        refuse_combinations(config.deepspeed, shard_size=parallel.shard_size or world, world=world)
    hang = config.mpl.guard.hang_seconds
    if hang is not None and hang >= parallel.timeout_seconds:
        raise ValueError(
            f"mpl_scale.guard.hang_seconds = {hang:g} comes too late: mpl_scale.parallel.timeout_seconds = "
            f"{parallel.timeout_seconds:g} ends the run before, and names no rank; set hang_seconds below it"
        )


def _check_method(config: RunConfig) -> None:
    method, phases = config.mpl.method, config.mpl.phases
    if config.mpl.model.bn_decay == 1.0:
        raise ValueError(
            "mpl_scale.model.bn_decay = 1: batch norm's averages, which evaluation reads, would never move from their "
            "initial values; use less, as 0.99"
        )
    if method.name in FED_BACK and method.feedback.baseline and method.feedback.baseline_decay == 1.0:
        raise ValueError(
            "mpl_scale.method.feedback.baseline_decay = 1: the average would never move from 0; use less, as 0.99, or "
            "set baseline = false"
        )
    soft, rule = method.pseudo_labels == "soft", method.feedback.rule
    if method.name in FED_BACK and soft and rule not in ("none", "soft_exact"):
        raise ValueError(
            f"mpl_scale.method.feedback.rule = {rule} with pseudo_labels = soft: a scalar times CE of soft labels has "
            "no gradient towards better ones; use soft_exact or none, or pseudo_labels = sampled"
        )
    if method.name in FED_BACK and not soft and rule == "soft_exact":
        raise ValueError(
            "mpl_scale.method.feedback.rule = soft_exact needs pseudo_labels = soft; for sampled labels use per_sample"
        )
    if method.name in FED_BACK and rule == "kekmodel" and not method.student_sees_labelled:
        raise ValueError(
            "mpl_scale.method.feedback.rule = kekmodel reads the loss on x_l of the student's update pass; set "
            "mpl_scale.method.student_sees_labelled = true, or use loss_difference"
        )
    if method.name == "reduced_mpl" and method.teacher_loss != "supervised":
        raise ValueError(
            f"mpl_scale.method.teacher_loss = {method.teacher_loss} with reduced_mpl: its teacher sees one stored "
            "distribution of an image, not two views, nor a mix; set supervised"
        )
    shifts = choose_derivative(config)[0] == "difference"
    bf16 = config.deepspeed.get("bf16", {}).get("enabled", False)
    for name, low in (("bf16", bf16), ("mpl_scale.parallel.tf32 = true", config.mpl.parallel.tf32 is True)):
        if shifts and low:
            raise ValueError(
                f"mpl_scale.method.feedback.rule = {rule} with {name}: its central difference drowns in the rounding; "
                "set mpl_scale.method.feedback.derivative = jvp (not with ZeRO-3), use fp32, or rule cosine"
            )
    given = config.mpl.data.distributions if method.name == "noisy_student" else None
    trained = phases.teacher_warmup.steps or config.mpl.model.teacher.weights or given
    if method.name in ("pseudo_label", "noisy_student") and not trained:
        raise ValueError(
            f"mpl_scale.method.name = {method.name} needs a trained teacher (eq. 1): set phases.teacher_warmup.steps, "
            "or model.teacher.weights; noisy_student also takes data.distributions"
        )
    if method.student_wait_steps >= phases.train.steps:
        raise ValueError(
            f"mpl_scale.method.student_wait_steps = {method.student_wait_steps} leaves the student no step of "
            f"phases.train.steps = {phases.train.steps}; lower it"
        )
    if phases.finetune.start_from == "ema" and not method.ema_decay:
        raise ValueError("mpl_scale.phases.finetune.start_from = ema needs mpl_scale.method.ema_decay above 0")


def _check_data(config: RunConfig) -> None:
    data, side = config.mpl.data, config.mpl.model.image_size
    for section, name in (("weak", "pad"), ("strong", "cutout"), ("strong", "crop_pad")):
        pixels = getattr(getattr(data, section), name)
        if pixels > side:
            raise ValueError(
                f"mpl_scale.data.{section}.{name} = {pixels} pixels with mpl_scale.model.image_size = {side}: views "
                f"may show nothing of the image; use {side} or less"
            )
    channels = config.mpl.model.in_chans
    for name, values, least in (("mean", data.mean, -1.0), ("std", data.std, 1e-3)):
        if len(values) != channels:
            raise ValueError(
                f"mpl_scale.data.{name} = {list(values)} with mpl_scale.model.in_chans = {channels}: give {channels} "
                f"value{'s, one for each channel' if channels > 1 else ''}"
            )
        if any(not least <= value <= 1.0 for value in values):
            raise ValueError(
                f"mpl_scale.data.{name} = {list(values)}: pixels are from 0 to 1 here, so each value is from {least:g} "
                "to 1; divide those of pixels from 0 to 255 by 255"
            )
    _check_apart(data)
    if data.unlabelled_index is not None and data.unlabelled_from != "auto":
        raise ValueError(
            f"mpl_scale.data.unlabelled_from = {data.unlabelled_from} with unlabelled_index: both say which "
            "images are unlabelled; leave one out"
        )


def _check_apart(data: DataConfig) -> None:
    """Places that are named apart, beside what names data in another way, and beside one another."""
    given = {name: getattr(data, name) for name in ("labelled", "unlabelled", "validation", "test")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given or data.is_synthetic:
        return
    if data.labelled is None:
        raise ValueError(
            f"mpl_scale.data.{min(given)} without mpl_scale.data.labelled, which has the classes: set labelled, or "
            "give all images by root"
        )
    for name in ("root", "index", "unlabelled_index", "label_offset"):
        if getattr(data, name) is not None:
            fix = """give it with a place, {"label_offset": ...}""" if "offset" in name else "set it to null"
            raise ValueError(
                f"mpl_scale.data.{name} = {getattr(data, name)} with mpl_scale.data.labelled: both say what "
                f"images there are; {fix}"
            )
    if data.unlabelled_from == "labelled" and data.unlabelled is not None:
        raise ValueError(
            "mpl_scale.data.unlabelled_from = labelled with mpl_scale.data.unlabelled, which it leaves unused; leave "
            "one out"
        )
    seen: dict[str, str] = {}
    for name, value in given.items():
        places = value if isinstance(value, list) else [value]
        if not places:
            raise ValueError(f"mpl_scale.data.{name} = []: name a place, or set null")
        for place in places:
            root = os.path.realpath(os.path.expanduser(place if isinstance(place, str) else place.root))
            if root in seen:
                raise ValueError(
                    f"mpl_scale.data.{name} and mpl_scale.data.{seen[root]} both name '{root}'; give each images of "
                    "its own (a test part that labelled has itself is found without data.test)"
                )
            seen[root] = name


def _batches(config: RunConfig, *, world: int) -> Batches:
    ranks = world // config.mpl.parallel.width
    given = {
        key: config.deepspeed.get(key)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    }
    for key, value in given.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{key} = {value!r}: must be a whole number of images, at least 1")
    total, micro, accumulation = given.values()
    parts = accumulation or (total // (micro * ranks) if total and micro else 1) or 1
    if total is None and micro is None:
        raise ValueError(
            'train_batch_size is missing, or "auto" with nothing to tell it from: give the labelled images per step '
            "over all ranks"
        )
    if total is None:
        total = (micro or 1) * parts * ranks
    if micro is None:
        micro = total // (parts * ranks)
    if micro * parts * ranks != total:
        raise _WrongWorld(
            f"batch equation broken: train_batch_size {total} != train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {parts} x data ranks {ranks} (= {world} ranks / width "
            f"{config.mpl.parallel.width}); use train_batch_size {max(micro, 1) * parts * ranks} or another number of "
            "ranks"
        )
    finetune = config.mpl.phases.finetune.batch_size or total
    if finetune % (ranks * parts):
        raise ValueError(
            f"mpl_scale.phases.finetune.batch_size = {finetune} does not divide over {ranks} data ranks x "
            f"gradient_accumulation_steps {parts}; use {-(-finetune // (ranks * parts)) * ranks * parts}"
        )
    return Batches(
        labelled=total,
        unlabelled=total * config.mpl.data.unlabelled_ratio,
        labelled_per_rank=micro,
        data_ranks=ranks,
        finetune=finetune,
        micro_batches=parts,
    )
