"""Who reads a setting: the table that tells which settings have no effect beside the others.

Only registered names whose needs are known are judged: what a user's own split, optimiser, view, loss or method reads
is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

FED_BACK = ("mpl", "reduced_mpl")
"""Methods whose teacher hears of the student."""
MIXES = ("mixup", "cutmix")
EXACT_RULES = ("per_sample", "soft_exact")
"""Feedback rules that differentiate the student along its labelled gradient."""
_FIXED = ("pseudo_label", "noisy_student")
"""Methods with a teacher that the student's phase does not train."""
_TEACHERS = (*FED_BACK, *_FIXED)
_MATCHING = ("fixmatch", "flexmatch", "freematch", "softmatch")
_CONSISTENT = ("uda", *_MATCHING)
"""Methods of one network, and losses, that compare two views of an unlabelled image."""
_UNLABELLED = (*_TEACHERS, *_CONSISTENT)
METHODS = (*_UNLABELLED, "supervised", *MIXES)
LOSSES = (*_CONSISTENT, "supervised", "pseudo_label", *MIXES)
_BY_CLASS = ("stratified", "transductive", "test_files")
SPLITS = (*_BY_CLASS, "imagenet_10", "cifar10_4k", "svhn_1k", "all_labelled")
OPTIMIZERS = ("sgd", "rmsprop", "lars", "adamw", "lamb", "muon")
WEAK_VIEWS = ("shift_crop", "random_resized_crop")
RULES = ("cosine", "dot", "loss_difference", "none", "flipped", "kekmodel", *EXACT_RULES)
_MEASURING = ("none", "loss_difference", "kekmodel")
"""Rules that measure the drop of the labelled loss without being asked, or never look at it."""
_WITHOUT_SHARDS = ("digits", "folder", "two_moons")
_LIMITS = {
    "enhance": ("brightness", "color", "contrast", "sharpness"),
    "posterize": ("posterize",),
    "rotate": ("rotate",),
    "shear": ("shear_x", "shear_y"),
    "translate": ("translate_x", "translate_y"),
    "sample_pairing": ("sample_pairing",),
    "cutout_op": ("cutout",),
}
"""Settings of data.strong, and the operations whose limit they are."""


class Reader(NamedTuple):
    """Settings below "mpl_scale", and those that decide whether anything reads them.

    fields: settings, or sections with all that is in them. by: the settings that decide. reads: tells it from their
    values. twins: a teacher's setting that equals the student's is one for both, and is not judged.
    """

    fields: tuple[str, ...]
    by: tuple[str, ...]
    reads: Callable[..., bool]
    twins: bool = False


def _rows(section: str, fields: str, by: str, reads: Callable[..., bool]) -> Reader:
    """A row for settings of one section, whose names are separated by spaces. by: in that section, or below "."."""
    deciding = tuple(name[1:] if name.startswith(".") else f"{section}.{name}" for name in by.split())
    return Reader(tuple(f"{section}.{name}" for name in fields.split()), deciding, reads)


def _only(readers: Iterable[str], *, known: Iterable[str]) -> Callable[[str], bool]:
    """Read by these names, and perhaps by those that are not known."""
    return lambda name: name in readers or name not in known


def _given(value: Any) -> bool:
    return value is not None


def _positive(value: float) -> bool:
    return value > 0


def _trains_teacher(method: str, warmup: int) -> bool:
    return method in FED_BACK or method not in METHODS or (method in _FIXED and warmup > 0)


def _by_loss(*losses: str) -> Callable[[str, str, int], bool]:
    """Read where one of these losses trains a network."""

    def reads(method: str, teacher_loss: str, warmup: int) -> bool:
        used = {method} & {*_CONSISTENT, *MIXES} | ({teacher_loss} if _trains_teacher(method, warmup) else set())
        return method not in METHODS or any(loss in losses or loss not in LOSSES for loss in used)

    return reads


def _by_loss_or_threshold(method: str, teacher_loss: str, warmup: int) -> bool:
    return method in _FIXED or _by_loss("pseudo_label", "fixmatch", "flexmatch")(method, teacher_loss, warmup)


def _preset(method: str, preset: str | None) -> bool:
    """Read where the teacher hears of the student; "paper" is what is so without it, "released_code" has more."""
    return method in FED_BACK or method not in METHODS or preset not in ("exact", "kekmodel_compat")


def _strong(method: str, labelled_view: str) -> bool:
    return method in _UNLABELLED or method not in METHODS or labelled_view == "strong"


def _optimiser(section: str) -> list[Reader]:
    def of(fields: str, *names: str) -> Reader:
        return _rows(section, fields, "name", _only(names, known=OPTIMIZERS))

    def on(fields: str, *schedules: str) -> Reader:
        return _rows(section, fields, "schedule", lambda schedule: schedule in schedules)

    return [
        of("momentum", "sgd", "rmsprop", "lars", "muon"),
        of("nesterov", "sgd", "lars", "muon"),
        of("rho eps", "rmsprop"),
        of("betas adam_eps", "adamw", "lamb", "muon"),
        of("trust", "lars"),
        on("decay_rate", "exponential", "step"),
        on("decay_steps", "exponential"),
        on("start_fraction", "one_cycle"),
        _rows(section, "decay_bn_and_bias", "weight_decay", _positive),
    ]


_WARMUP = ".method.name .phases.teacher_warmup.steps"
_LOSS = "name teacher_loss .phases.teacher_warmup.steps"


def _networks() -> list[Reader]:
    rows, teaches = [], _only(_TEACHERS, known=METHODS)
    for network in ("model.teacher", "model.student"):
        rows.append(_rows(network, "init_range", "init", lambda init: init == "uniform"))
        rows.append(_rows(network, "new_classifier", "weights", _given))
    return [
        *rows,
        _rows("model.teacher", "init init_range weights new_classifier", ".method.name", teaches)._replace(twins=True),
        _rows("model.teacher", "dropout drop_path frozen", _WARMUP, _trains_teacher)._replace(twins=True),
        _rows("optim", "teacher", _WARMUP, _trains_teacher)._replace(twins=True),
        _rows("phases", "teacher_warmup", ".method.name", teaches),
        _rows("phases.finetune", "optim batch_size start_from", "steps", _positive),
        *_optimiser("optim.teacher"),
        *_optimiser("optim.student"),
        *_optimiser("phases.finetune.optim"),
    ]


def _method() -> list[Reader]:
    def by(*methods: str) -> Callable[[str], bool]:
        return _only(methods, known=METHODS)

    def rule(*without: str) -> Callable[[str], bool]:
        return lambda name: name not in without

    return [
        _rows("method", "pseudo_labels pseudo_label_temperature student_sees_labelled feedback", "name", by(*FED_BACK)),
        _rows("method", "pseudo_label_view", "name", by("mpl")),
        _rows("method", "preset", "name preset", _preset),
        _rows("method", "student_label_smoothing", "name", by(*_TEACHERS)),
        _rows("method", "teacher_loss", f"name {_WARMUP.split()[1]}", _trains_teacher),
        _rows("method", "supervised_weight", "name", rule("supervised")),
        _rows("method", "pseudo_label_threshold", _LOSS, _by_loss_or_threshold),
        _rows("method", "mixup_alpha", _LOSS, _by_loss(*MIXES)),
        _rows("method", "uda.weight uda.ramp_steps", _LOSS, _by_loss(*_CONSISTENT, "pseudo_label")),
        _rows("method", "uda.temperature uda.threshold uda.labelled_threshold", _LOSS, _by_loss("uda")),
        _rows("method", "freematch", _LOSS, _by_loss("freematch")),
        _rows("method", "softmatch", _LOSS, _by_loss("softmatch")),
        _rows("method.uda", "temperature threshold ramp_steps", "weight", _positive),
        _rows(
            "method.feedback", "weight dropout baseline baseline_decay baseline_bias_correction", "rule", rule("none")
        ),
        _rows("method.feedback", "derivative", "rule", _only(EXACT_RULES, known=RULES)),
        _rows("method.feedback", "normalise", "rule", _only(("soft_exact",), known=RULES)),
        _rows("method.feedback", "baseline_decay baseline_bias_correction", "baseline", bool),
    ]


def _data() -> list[Reader]:
    def by_split(fields: str, *splits: str) -> Reader:
        return _rows("data", fields, "split", _only(splits, known=SPLITS))

    unlabelled, strong = _only(_UNLABELLED, known=METHODS), "data.strong"
    places = "root index unlabelled_index distributions labelled unlabelled validation test"
    of_files = f"{places} label_offset check_data allow_damaged_shards split"
    of_parts = "labelled_fraction held_out_shards labelled_per_class"
    of_images = "weak strong evaluation mean std max_pixels max_bad_fraction threads prefetch resident resident_bytes"
    return [
        _rows("data", "synthetic_images", "source", lambda source: source == "synthetic"),
        _rows("data", f"{of_files} {of_parts} test_fraction jitter", "source", lambda source: source != "synthetic"),
        _rows("data", f"source split {of_parts}", "labelled", lambda place: place is None),
        _rows("data", "test_fraction split_seed", "labelled test", lambda *places: None in places),
        _rows("data", "test_fraction split_seed", "labelled validation", lambda *places: None in places),
        by_split("labelled_fraction", "imagenet_10"),
        by_split("held_out_shards", "imagenet_10", "all_labelled"),
        by_split("labelled_per_class split_seed", *_BY_CLASS),
        by_split("test_fraction", "stratified"),
        _rows("data", "unlabelled_ratio unlabelled_from unlabelled_index", ".method.name", unlabelled),
        _rows("data", "distributions", ".method.name", _only(("reduced_mpl", "noisy_student"), known=METHODS)),
        _rows("data", of_images, "source", lambda source: source != "two_moons"),
        _rows(
            "data",
            "allow_damaged_shards",
            "source unlabelled_index",
            lambda source, other: source not in _WITHOUT_SHARDS or other is not None,
        ),
        _rows("data", "strong", ".method.name labelled_view", _strong),
        _rows("data", "resident_bytes", "resident", lambda resident: resident != "off"),
        _rows("data.weak", "scale ratio", "kind", _only(("random_resized_crop",), known=WEAK_VIEWS)),
        _rows("data.weak", "pad", "kind", _only(("shift_crop",), known=WEAK_VIEWS)),
        _rows("data.weak", "fill", "kind pad", lambda kind, pad: kind != "shift_crop" or pad > 0),
        _rows("data.evaluation", "crop_pct", "kind", lambda kind: kind != "resize"),
        _rows(strong, "probability", "probability_range", lambda drawn: drawn is None),
        _rows(
            strong,
            "op_set ops magnitude random_magnitude magnitude_rule probability probability_range " + " ".join(_LIMITS),
            "num_ops",
            _positive,
        ),
        *(
            _rows(strong, limit, "ops", lambda ops, readers=readers: not ops or not set(ops).isdisjoint(readers))
            for limit, readers in _LIMITS.items()
        ),
    ]


READERS: tuple[Reader, ...] = (
    *_networks(),
    *_method(),
    *_data(),
    _rows("parallel", "switch_at empty_slices halo", "width", lambda width: width > 1),
    _rows(
        "parallel",
        "recompute_backend recompute_offload",
        "recompute",
        lambda policy: policy != "none" and set(policy) != {"none"},
    ),
    _rows("logging", "labelled_loss_drop", ".method.name", _only(FED_BACK, known=METHODS)),
    _rows("logging", "labelled_loss_drop", ".method.feedback.rule", lambda rule: rule not in _MEASURING),
    _rows("logging", "view_grid_every", ".method.name", _only(_UNLABELLED, known=METHODS)),
    _rows("checkpoint", "timeout_seconds", "asynchronous", bool),
    _rows("checkpoint", "keep_every", "every", _positive),
    _rows("guard", "rewind", ".checkpoint.every", _positive),
    _rows("guard", "max_skipped", "nonfinite", lambda action: action == "skip"),
)
