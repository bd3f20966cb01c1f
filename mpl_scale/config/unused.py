"""Settings that were given and have no effect beside the others: harmless, but not what their author thinks.

Only registered names whose needs are known are judged: what a user's own split, optimiser or view reads is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mpl_scale.config.presets import flatten
from mpl_scale.config.schema import Config, DataConfig, OptimConfig

_BY_SHARD, _BY_CLASS = ("imagenet_10",), ("stratified", "transductive", "test_files")
_BY_ORDER = ("cifar10_4k", "svhn_1k")
_SPLIT_SETTINGS = {
    "labelled_fraction": _BY_SHARD,
    "held_out_shards": (*_BY_SHARD, "all_labelled"),
    "labelled_per_class": _BY_CLASS,
    "test_fraction": ("stratified",),
    "split_seed": _BY_CLASS,
}
"""Splits that read a setting."""
_SPLITS = {*_BY_CLASS, *_BY_SHARD, *_BY_ORDER, "all_labelled"}
_WEAK_SETTINGS = {"scale": "random_resized_crop", "ratio": "random_resized_crop", "pad": "shift_crop"}
_OPTIMIZER_SETTINGS = {
    "momentum": ("sgd", "rmsprop", "lars"),
    "nesterov": ("sgd", "lars"),
    "rho": ("rmsprop",),
    "eps": ("rmsprop",),
    "betas": ("adamw",),
    "adam_eps": ("adamw",),
    "trust": ("lars",),
}
_OPTIMIZERS = {"sgd", "rmsprop", "lars", "adamw"}
_METHODS = {"supervised", "mixup", "cutmix", "pseudo_label", "noisy_student", "mpl", "reduced_mpl"}
_METHODS |= {"uda", "fixmatch", "flexmatch", "freematch", "softmatch"}
"""And training losses."""
_SCHEDULE_SETTINGS = {
    "decay_rate": ("exponential", "step"),
    "decay_steps": ("exponential",),
    "start_fraction": ("one_cycle",),
}


class _Unused(NamedTuple):
    """A field below "mpl_scale", or a section with all that is in it, and the setting that leaves it without effect."""

    field: str
    because: str


def unused_settings(config: Config, given: Mapping[str, Any]) -> list[str]:
    """One line that names the settings without effect; none where there are none.

    Args:
        config: validated.
        given: the "mpl_scale" section as it was written: a default that is written out asks for nothing.
    """
    asked, defaults = flatten(given), flatten(_defaults(config))
    named = {name for name, value in asked.items() if name not in defaults or defaults[name] != value}
    found = []
    for field, because in _unused(config):
        hit = sorted(name for name in named if name == field or name.startswith(f"{field}."))
        found += [f"mpl_scale.{name} ({because})" for name in hit]
    return [f"no effect here: {', '.join(found)}"] if found else []


def _defaults(config: Config) -> dict[str, Any]:
    """The sections with every field that has a default at it."""
    required = {
        "model": {"num_classes": 2, "image_size": 1, **{name: {"name": ""} for name in ("teacher", "student")}},
        "optim": {name: {"lr": 1.0} for name in ("teacher", "student")},
        "phases": {"train": {"steps": 1}},
    }
    return type(config).model_validate(required).model_dump(mode="json")


def _unused(config: Config) -> Iterator[_Unused]:
    model, parallel, finetune = config.model, config.parallel, config.phases.finetune
    for name in ("teacher", "student"):
        network = getattr(model, name)
        if network.init != "uniform":
            yield _Unused(f"model.{name}.init_range", f"init = {network.init}")
        if network.weights is None:
            yield _Unused(f"model.{name}.new_classifier", "weights = null")
    yield from _unused_data(config.data)
    for name in ("teacher", "student"):
        yield from _unused_optim(f"optim.{name}", getattr(config.optim, name))
    if finetune.steps:
        yield from _unused_optim("phases.finetune.optim", finetune.optim)
    if parallel.width == 1:
        yield from (_Unused(f"parallel.{name}", "width = 1") for name in ("switch_at", "empty_slices", "halo"))
    if not config.checkpoint.asynchronous:
        yield _Unused("checkpoint.timeout_seconds", "asynchronous = false")
    if config.guard.nonfinite != "skip":
        yield _Unused("guard.max_skipped", f"nonfinite = {config.guard.nonfinite}")
    names = {config.method.name, config.method.teacher_loss}
    for name in ("freematch", "softmatch"):
        if name not in names and names <= _METHODS:
            yield _Unused(f"method.{name}", f"no loss is {name}")
    if not config.method.feedback.baseline:
        for name in ("baseline_decay", "baseline_bias_correction"):
            yield _Unused(f"method.feedback.{name}", "baseline = false")


def _unused_data(data: DataConfig) -> Iterator[_Unused]:
    if data.split in _SPLITS:
        for name, splits in _SPLIT_SETTINGS.items():
            if data.split not in splits:
                yield _Unused(f"data.{name}", f"split = {data.split}")
    for name, kind in _WEAK_SETTINGS.items():
        if data.weak.kind in _WEAK_SETTINGS.values() and data.weak.kind != kind:
            yield _Unused(f"data.weak.{name}", f"kind = {data.weak.kind}")
    if data.evaluation.kind == "resize":
        yield _Unused("data.evaluation.crop_pct", "kind = resize")
    if data.strong.probability_range is not None:
        yield _Unused("data.strong.probability", "probability_range is drawn from instead")
    if data.resident == "off":
        yield _Unused("data.resident_bytes", "resident = off")


def _unused_optim(where: str, optim: OptimConfig) -> Iterator[_Unused]:
    if optim.name in _OPTIMIZERS:
        for name, optimizers in _OPTIMIZER_SETTINGS.items():
            if optim.name not in optimizers:
                yield _Unused(f"{where}.{name}", f"name = {optim.name}")
    for name, schedules in _SCHEDULE_SETTINGS.items():
        if optim.schedule not in schedules:
            yield _Unused(f"{where}.{name}", f"schedule = {optim.schedule}")
