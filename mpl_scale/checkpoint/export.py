"""One network of a checkpoint as a folder: its weights as timm loads them, or a program, config.json and a model card.

    model = timm.create_model(config["architecture"], num_classes=..., checkpoint_path="DIR/model.safetensors")
    model = timm.create_model("local-dir:DIR", pretrained=True)

Models that are registered here and not in timm have the same files; `mpl_scale.model.<network>.weights` reads both.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mpl_scale.checkpoint.card import CARD_NAME, Exported, model_card
from mpl_scale.checkpoint.format import CheckpointError, read_index
from mpl_scale.checkpoint.programs import FILES as PROGRAMS
from mpl_scale.checkpoint.programs import ONNX_DATA, require_format, write_program
from mpl_scale.checkpoint.reader import read_prefix
from mpl_scale.config.former import without_former_fields
from mpl_scale.config.load import import_modules
from mpl_scale.config.schema import Config, NetworkConfig
from mpl_scale.files import naming, sync
from mpl_scale.models import build_model
from mpl_scale.models.hub import FILE_NAME
from mpl_scale.models.registry import MODELS
from mpl_scale.models.weights import plain_model, to_plain

NETWORKS = {"teacher": "teacher", "student": "student", "ema": "student"}
"""What can be exported, and whose architecture it has."""
CONFIG_NAME = "config.json"
FILES = {"timm": FILE_NAME, **PROGRAMS}
"""By format."""


def export(
    checkpoint: Path, output: Path, *, network: str, format: str = "timm", overwrite: bool = False
) -> dict[str, Any]:
    """Write a network ("teacher", "student", "ema") into `output`, which is made; returns config.json's content.

    format: of FILES. overwrite: whether files of another network or format that are there may be replaced.

    Raises:
        CheckpointError: the checkpoint is damaged, has no such network or not the configuration of a run.
        ValueError: the folder holds another network, or another format of it; the format needs a package, or cannot
            hold this network (programs.py).
    """
    require_format(format)
    config = checkpoint_config(checkpoint)
    import_modules(config.imports)
    section: NetworkConfig = getattr(config.model, NETWORKS[network])
    weights = read_network(checkpoint, network)
    field = f"mpl_scale.model.{NETWORKS[network]}"
    plain = to_plain(weights, section, config.model, field=field)
    content = _hub_config(config, section, labels=class_names(checkpoint))
    index = read_index(checkpoint)
    exported = Exported(config, section, network, index.step, index.metadata, content, format)
    with _replacing_files(output, format=format, overwrite=overwrite) as drafts:
        if format == "timm":
            _write_weights(plain, drafts / FILE_NAME)
        else:
            model = plain_model(section, config.model, field=field, device="cpu")
            own = build_model(section, config.model, field=field, seed=0)
            model.load_state_dict(plain)
            own.load_state_dict(weights)
            write_program(model.eval(), drafts, format=format, shape=exported.shape, own=own.eval())
        (drafts / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (drafts / CARD_NAME).write_text(model_card(exported), encoding="utf-8")
    return content


def _write_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(dict(weights), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(0o666 & ~_umask())


@contextmanager
def _replacing_files(output: Path, *, format: str, overwrite: bool) -> Iterator[Path]:
    """An empty folder to fill, whose files come to `output`, which is made, at the end; an exception deletes them.

    ValueError where `output` has a network in another format, at once, or other files of these names, at the end,
    unless they may be replaced.
    """
    formats = [name for name in FILES.values() if name != FILES[format] and (output / name).exists()]
    _refuse_others(output, formats, overwrite=overwrite)
    drafts = output / ".export"
    shutil.rmtree(drafts, ignore_errors=True)  # of a process that was killed
    drafts.mkdir(parents=True)
    try:
        with naming(drafts):
            yield drafts
        files = sorted(drafts.iterdir(), key=lambda path: path.name == CONFIG_NAME)  # it says that the rest is there
        names = [name for name in (*FILES.values(), ONNX_DATA) if not (drafts / name).exists()]
        stale = [output / name for name in names if (output / name).exists()]
        others = [path.name for path in files if _is_other(output / path.name, path)] + [path.name for path in stale]
        _refuse_others(output, others, overwrite=overwrite)
        for path in files:
            sync(path)
            os.replace(path, output / path.name)
        for path in stale:
            path.unlink()
        sync(output)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def _refuse_others(output: Path, others: list[str], *, overwrite: bool) -> None:
    if others and not overwrite:
        raise ValueError(
            f"--output {output} holds another network ({', '.join(sorted(others))}); give --overwrite to replace it, "
            "or choose another folder"
        )


def _is_other(found: Path, wanted: Path) -> bool:
    return found.exists() and not (found.is_file() and filecmp.cmp(found, wanted, shallow=False))


def _umask() -> int:
    """Of this process; it can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current


def checkpoint_config(checkpoint: Path) -> Config:
    """The mpl_scale section of the run that wrote a checkpoint."""
    metadata = read_index(checkpoint).metadata
    try:
        return Config.model_validate_json(json.dumps(without_former_fields(metadata["config"]["mpl_scale"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # pydantic's are ValueErrors
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {checkpoint} does not hold its run's configuration ({reason}): use the version that wrote it"
        ) from error


def read_network(checkpoint: Path, network: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, whole, on the CPU.

    Raises:
        CheckpointError: the checkpoint has no such network; else as `read_prefix`.
    """
    table = read_index(checkpoint).table
    held = sorted({key.split("/")[0] for key in table if "/master/" in key})
    if network not in held:
        raise CheckpointError(
            f"--network {network}: checkpoint {checkpoint} holds {' and '.join(held)} only; choose another network "
            "or an earlier checkpoint"
        )
    parameters = read_prefix(checkpoint, f"{network}/master")
    has_buffers = any(key.startswith(f"{network}/buffer/") for key in table)
    return parameters | (read_prefix(checkpoint, f"{network}/buffer") if has_buffers else {})


def class_names(checkpoint: Path) -> list[str] | None:
    """The classes' names in the order of labels, as the run wrote them beside its checkpoints; None: it did not."""
    try:
        names = json.loads((checkpoint.absolute().parents[1] / "splits" / "classes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError):
        return None
    return names if isinstance(names, list) else None


def _hub_config(config: Config, section: NetworkConfig, *, labels: list[str] | None) -> dict[str, Any]:
    """config.json as timm's models on the Hugging Face hub have it, and what else describes the network.

    batch_norm: eps and momentum of the run, for those who train on. timm's layers have an eps of their own, whose
    difference is in the variances (weights.py).
    """
    evaluation, data, size = config.data.evaluation, config.data, config.model.image_size
    content: dict[str, Any] = {
        "architecture": section.name if section.name in MODELS else section.name.partition(".")[0],
        "num_classes": config.model.num_classes,
        "pretrained_cfg": {
            "input_size": [config.model.in_chans, size, size],
            "fixed_input_size": False,
            "interpolation": evaluation.interpolation,
            "crop_pct": evaluation.crop_pct if evaluation.kind == "center_crop" else 1.0,
            "crop_mode": "center" if evaluation.kind == "center_crop" else "squash",
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": config.model.num_classes,
            "custom_load": False,
        },
        "batch_norm": {"eps": config.model.bn_eps, "momentum": 1.0 - config.model.bn_decay},
    }
    if labels is not None and len(labels) == config.model.num_classes:
        content["label_names"] = labels
    channels = {} if config.model.in_chans == 3 else {"in_chans": config.model.in_chans}
    if arguments := {**section.kwargs, **channels}:
        content["model_args"] = arguments
    return content
