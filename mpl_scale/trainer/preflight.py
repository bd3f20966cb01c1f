"""Checks of a run's input beyond its config file: names, images, models.

All of it is checked before the ranks join, and raises ValueError with the field or file and the fix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpl_scale.augment import StrongView
from mpl_scale.augment.registry import refuse_colours
from mpl_scale.config import Batches, RunConfig
from mpl_scale.config.checks import choose_derivative
from mpl_scale.config.names import require_known
from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.data import ImageFiles, Splits, load_data, make_splits, write_manifest
from mpl_scale.data.decode.views import evaluation_view
from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.probe import pam_pixels
from mpl_scale.data.index.labels import range_hint
from mpl_scale.data.index.reader import VERSION, IndexedImages
from mpl_scale.data.joined import JoinedImages
from mpl_scale.data.registry import ImageSet, refuse_options
from mpl_scale.data.resident_parts import decide, refuse_view
from mpl_scale.data.samples.further import with_unlabelled
from mpl_scale.data.samples.manifest import TWINS, refuse_other_unlabelled
from mpl_scale.data.samples.splits import SPLITS
from mpl_scale.data.samples.twins import apart_notes, without_twins
from mpl_scale.data.vectors import LENGTHS, input_shape
from mpl_scale.files import expanded, replace_text
from mpl_scale.models import Pass, build_model
from mpl_scale.models.hub import TIMM
from mpl_scale.models.passes import within
from mpl_scale.models.randomness import OnlyOurs
from mpl_scale.models.weights import check_weights, loading_note, replaced_classifier, weights_file
from mpl_scale.mpl import FEEDBACK_RULES, LOSSES, METHODS
from mpl_scale.mpl.forward_mode import following
from mpl_scale.optim import OPTIMIZERS, layer_scales, parameter_groups
from mpl_scale.spatial import plan_layout, refuse_empty_slices
from mpl_scale.trainer.phases import initial_seed, recomputed


def check_names(run: RunConfig) -> None:
    """Raise ValueError for a name in the config that is not registered, or settings that exclude each other."""
    method, optim = run.mpl.method, run.mpl.optim
    refuse_options(run.mpl.data)
    require_known("mpl_scale.data.split", run.mpl.data.split, SPLITS)
    require_known("mpl_scale.method.name", method.name, METHODS.keys() - {"teacher_warmup"})
    require_known("mpl_scale.method.feedback.rule", method.feedback.rule, FEEDBACK_RULES)
    require_known("mpl_scale.method.teacher_loss", method.teacher_loss, LOSSES)
    if not METHODS[method.name].teacher_sees_images and run.mpl.data.distributions is None:
        raise ValueError(
            f"mpl_scale.method.name = {method.name} learns from a trained teacher's distributions; write them with "
            "mpl-scale distributions and set mpl_scale.data.distributions"
        )
    require_known("mpl_scale.optim.teacher.name", optim.teacher.name, OPTIMIZERS)
    require_known("mpl_scale.optim.student.name", optim.student.name, OPTIMIZERS)
    require_known("mpl_scale.phases.finetune.optim.name", run.mpl.phases.finetune.optim.name, OPTIMIZERS)
    strong = StrongView(run.mpl.data.strong, seed=0, stream=0)
    if run.mpl.data.labelled_view == "strong" and strong.pairs:
        raise ValueError(
            "mpl_scale.data.labelled_view = strong with sample_pairing among the operations, which mixes unlabelled "
            "images in; set data.strong.op_set = no_pairing"
        )
    refuse_colours(run.mpl.data.strong, run.mpl.model.in_chans)
    if run.mpl.data.source in LENGTHS:
        _check_vectors(run)
    elif run.mpl.data.jitter and not run.mpl.data.is_synthetic:
        raise ValueError(
            f"mpl_scale.data.jitter = {run.mpl.data.jitter:g} has no effect with source {run.mpl.data.source}: it is "
            "the strong view of vectors, and images have mpl_scale.data.strong; leave it out"
        )
    refuse_view(run.mpl.data, run.mpl.model.image_size)
    evaluation_view(run.mpl.data.evaluation, run.mpl.model.image_size)


def _check_vectors(run: RunConfig) -> None:
    """What images have and vectors have not."""
    source, data = run.mpl.data.source, run.mpl.data
    if run.mpl.parallel.width > 1:
        raise ValueError(f"mpl_scale.parallel.width = {run.mpl.parallel.width}: source {source} has no width; set 1")
    if "cutmix" in (run.mpl.method.name, run.mpl.method.teacher_loss):
        raise ValueError(f"cutmix pastes boxes into images, and source {source} has none; use mixup")
    for name in ("distributions", "index", "unlabelled_index", "labelled"):
        if getattr(data, name) is not None:
            raise ValueError(f"mpl_scale.data.{name} = '{getattr(data, name)}' is for images; source {source} has none")
    if every := run.mpl.logging.view_grid_every:
        raise ValueError(
            f"mpl_scale.logging.view_grid_every = {every}: source {source} has vectors, and no views to be drawn; set 0"
        )


def load_splits(run: RunConfig) -> Splits:
    """The data set, every header read, and its parts."""
    config, data = run.mpl, run.mpl.data
    images = load_data(config)
    if len(images.classes) != config.model.num_classes:
        first = images.sets[0] if isinstance(images, JoinedImages) else images
        hint = range_hint(first.meta) if isinstance(first, IndexedImages) else ""
        raise ValueError(
            f"mpl_scale.model.num_classes = {config.model.num_classes}, but the data set has {len(images.classes)} "
            f"classes; set {len(images.classes)}{hint}"
        )
    splits = make_splits(images, config=data, seed=config.seed)
    if data.is_apart:
        splits = without_twins(splits)
    if data.unlabelled_index is not None and not data.is_synthetic:
        folder = expanded(data.unlabelled_index)
        splits = with_unlabelled(splits, folder, allow_damaged=data.allow_damaged_shards)
    if data.source not in LENGTHS:
        _check_channels(images, data.decoded_channels)
        decide(data, splits, config.model.image_size)
    return splits


def _check_channels(images: ImageSet, channels: int) -> None:
    """The first and last image of each set have as many channels as are decoded, where their formats leave it open."""
    for part in images.sets if isinstance(images, JoinedImages) else (images,):
        if channels == 3 and not (isinstance(part, IndexedImages) and part.of_rows):
            continue
        for sample in {0, len(part) - 1}:
            try:
                encoded = part.read(sample)
            except UnreadableImage:
                continue  # one of the bad images, which are counted
            try:
                pam_pixels(encoded, channels=channels)
            except UnreadableImage as error:
                raise ValueError(f"{part.name(sample)}: {error}") from error


def record_splits(splits: Splits, output: Path, *, manifest: Mapping[str, Any] | None = None) -> list[str]:
    """Write the splits' manifest into the run's folder, on one rank; what people should know about the data.

    manifest: of the splits, where it is known already.
    """
    notes = []
    if write_manifest(splits, output / "splits", manifest=manifest):
        notes.append(f"the data or their split are not those that {output / 'splits'} was written for; it is replaced")
    images = splits.images
    sets = images.sets if isinstance(images, JoinedImages) else (images,)
    for part in sets:
        if isinstance(part, IndexedImages) and part.meta["version"] < VERSION:
            notes.append(f"index '{part.folder}' is of an earlier version, which does not check labels; build it again")
    if images.bad:
        named = "; ".join(f"{name}: {reason}" for name, reason in images.refusals(5).items())
        notes.append(f"{images.bad} of {len(images)} images are left out, unreadable: {named}")
    names = json.dumps([str(name) for name in images.classes])  # in the order of labels, for mpl-scale export
    replace_text(output / "splits" / "classes.json", f"{names}\n")
    notes.append(
        f"data: {len(splits.labelled):,} labelled, {len(splits.unlabelled):,} unlabelled and {len(splits.test):,} "
        f"evaluation images, {len(splits.held_out):,} held out"
    )
    fields = images.names if isinstance(images, JoinedImages) else ("",)
    for field, part in zip(fields, sets, strict=True):
        if isinstance(part, IndexedImages | ImageFiles):
            notes += [f"{field}: {line}" if field else line for line in part.contents()]
    if fields[0]:
        return notes + apart_notes(splits, output / "splits" / TWINS)
    if isinstance(images, JoinedImages):
        notes += images.tested(splits.test)[:5]
    first = sets[0]
    own = first.ids_of("test") if isinstance(first, IndexedImages | ImageFiles) else splits.test
    if len(own) and not np.isin(splits.test[:1], own).all():
        notes.append(
            f"the data set's own test part, {len(own):,} images, is not used; mpl_scale.data.split = test_files "
            "evaluates on it"
        )
    return notes


def repeated(splits: Splits, batches: Batches, *, unlabelled: bool) -> list[str]:
    """A line for each batch that is larger than its part, and so shows images several times.

    unlabelled: whether the run has unlabelled batches.
    """
    sizes = [("labelled", batches.labelled, len(splits.labelled))]
    sizes += [("unlabelled", batches.unlabelled, len(splits.unlabelled))] if unlabelled else []
    return [
        f"a step takes {batch:,} {name} images and there are {count:,}: it sees each {batch / count:.1f} times"
        for name, batch, count in sizes
        if batch > count
    ]


def check_resumed(splits: Splits, checkpoint: Path) -> None:
    """The run that a checkpoint is of was trained with this index of unlabelled images; the folder is step_...."""
    refuse_other_unlabelled(splits, checkpoint.absolute().parents[1] / "splits")


def find_weights(run: RunConfig) -> dict[str, str]:
    """The commit of each network's weights that timm publishes, which are then in the hub's cache.

    Raises ValueError: they are not, and cannot be downloaded.
    """
    found = {}
    for name in ("teacher", "student"):
        section = getattr(run.mpl.model, name)
        if section.weights == TIMM:
            found[name] = weights_file(section, field=f"mpl_scale.model.{name}").parent.name
    return found


def network_notes(run: RunConfig) -> list[str]:
    """Lines on what networks start from and how they are trained. Raises ValueError as `check_models`."""
    found = []
    for name in ("teacher", "student"):
        field, section = f"mpl_scale.model.{name}", getattr(run.mpl.model, name)
        if (line := loading_note(section, run.mpl.model, field=field)) is not None:
            found.append(line)
        elif section.frozen:
            found.append(
                f"{field}.frozen = {section.frozen}: without {field}.weights these parts keep their initial values"
            )
    return found + _without_matrices(run)


def _without_matrices(run: RunConfig) -> list[str]:
    """A line for each optimiser with a rule of its own for hidden matrices (Muon) that has none to train."""
    optim, finetune = run.mpl.optim, run.mpl.phases.finetune
    used = [("teacher", "optim.teacher", optim.teacher), ("student", "optim.student", optim.student)]
    used += [("student", "phases.finetune.optim", finetune.optim)] if finetune.steps else []
    found = []
    for network, where, config in used:
        if not OPTIMIZERS[config.name].matrices_apart:
            continue
        section = getattr(run.mpl.model, network)
        model = build_model(section, run.mpl.model, field=f"mpl_scale.model.{network}", seed=0, device="meta")
        if not any(group["matrices"] for group in parameter_groups(model, config)):
            found.append(
                f"mpl_scale.{where}.name = {config.name}: the {network} has no matrices of hidden layers to train, so "
                "all its parameters move by AdamW's rule; momentum and nesterov have no effect"
            )
    return found


def check_models(run: RunConfig) -> None:
    """Build both networks without memory, and show them an image of the configured size."""
    config = run.mpl
    for name in ("teacher", "student"):
        field = f"mpl_scale.model.{name}"
        section = getattr(config.model, name)
        check_weights(section, config.model, field=field)
        if name == "teacher":
            _check_teaching(run)
        model = build_model(section, config.model, field=field, seed=initial_seed(config.seed, name), device="meta")
        _check_frozen(model, section, config.model, field=field)
        sees_images = name == "student" or METHODS[config.method.name].teacher_sees_images
        shape = (2, *(input_shape(config) if sees_images else (config.model.num_classes,)))
        _check_forward(model, shape, config.model.num_classes, called=f"{field}.name = {section.name}")
        if name == "student" and choose_derivative(run)[0] == "jvp":
            _check_forward_mode(model, shape, called=f"{field}.name = {section.name}")
        _check_split(model, run, field=field, name=section.name)
        _check_layer_decay(model, run, name)
        recomputed(model, config.parallel)


def _check_frozen(model: nn.Module, section: NetworkConfig, shared: ModelConfig, *, field: str) -> None:
    """A classifier that starts untrained is trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    new = replaced_classifier(section, shared, field=field)
    if new and trained.isdisjoint(new):
        raise ValueError(
            f"{field}.frozen = {section.frozen} holds the classifier ({', '.join(new)}), which {field}.weights = "
            f"{section.weights} leaves untrained; take it out of frozen"
        )


def _check_layer_decay(model: nn.Module, run: RunConfig, network: str) -> None:
    """Where a rate decays by layer, the model says what its layers are."""
    config = run.mpl
    layer_scales(model, getattr(config.optim, network).layer_decay, field=f"mpl_scale.optim.{network}.layer_decay")
    if network == "student" and config.phases.finetune.steps:
        field = "mpl_scale.phases.finetune.optim.layer_decay"
        layer_scales(model, config.phases.finetune.optim.layer_decay, field=field)


def _check_forward(model: nn.Module, shape: tuple[int, ...], classes: int, *, called: str) -> None:
    """A pass without memory gives a logit per class, and in training draws no random numbers but the package's.

    A model that reads values on the host while it trains cannot be shown to draw none: it is believed.
    """
    step, rows = torch.zeros((), dtype=torch.int64, device="meta"), torch.arange(shape[0], device="meta")
    images = torch.empty(shape, device="meta")
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except (RuntimeError, AssertionError) as error:
        hint = "; set image_size, or its kwargs.img_size" if isinstance(error, AssertionError) else ""
        reason = _first_line(error).rstrip(".")
        raise ValueError(f"{called} cannot take {_called(shape)}: {reason}{hint}") from error
    try:
        of_training = within(Pass(seed=0, stream=0, step=step, rows=rows), model)
        with suppress(RuntimeError, AssertionError), torch.no_grad(), OnlyOurs(), of_training:
            model.train()(images)
    except ValueError as error:
        raise ValueError(f"{called} cannot be trained here: {error}") from error
    if not torch.is_tensor(logits) or logits.shape != (shape[0], classes):
        found = list(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"{called} gives {found}, not one logit per class")


def _check_forward_mode(model: nn.Module, shape: tuple[int, ...], *, called: str) -> None:
    """Every layer has a forward-mode derivative; the first that has none is named."""
    running: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _, path=path: running.append(f"{path} ({type(layer).__name__})"))
        for path, layer in model.named_modules()
    ]
    step, rows = torch.zeros((), dtype=torch.int64, device="meta"), torch.arange(shape[0], device="meta")
    of_pass = Pass(seed=0, stream=0, step=step, rows=rows, update_statistics=False)
    direction = {name: torch.empty_like(parameter) for name, parameter in model.named_parameters()}
    try:
        with within(of_pass, model.train()), following(model, direction):
            model(torch.empty(shape, device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{called}: {running[-1]} has no forward-mode derivative ({_first_line(error)}), which feedback rules "
            "per_sample and soft_exact use; set mpl_scale.method.feedback.derivative = difference"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_teaching(run: RunConfig) -> None:
    """A teacher that is not trained in this run has its classifier."""
    config = run.mpl
    needed = config.method.name in ("pseudo_label", "noisy_student") and not config.phases.teacher_warmup.steps
    field = "mpl_scale.model.teacher"
    if needed and replaced_classifier(config.model.teacher, config.model, field=field):
        raise ValueError(
            f"{field}.weights = {config.model.teacher.weights} leaves the teacher a new classifier, and method "
            f"{config.method.name} does not train it; set mpl_scale.phases.teacher_warmup.steps, or give weights of "
            f"{config.model.num_classes} classes"
        )


def _called(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return f"vectors of {shape[1]} numbers"
    return f"images of mpl_scale.model.image_size = {shape[-1]}"


def _check_split(model: nn.Module, run: RunConfig, *, field: str, name: str) -> None:
    parallel, size = run.mpl.parallel, run.mpl.model.image_size
    if parallel.width == 1:
        return
    try:
        layout = plan_layout(
            model, image_size=size, width=parallel.width, switch_at=parallel.switch_at, halo=parallel.halo
        )
        if not parallel.empty_slices:
            refuse_empty_slices(layout)
    except ValueError as error:
        raise ValueError(
            f"mpl_scale.parallel.width = {parallel.width} cannot split {field}.name = {name}: {error}"
        ) from error
