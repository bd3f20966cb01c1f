"""A network out of a checkpoint, whole on every rank, for inference."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.checkpoint import CheckpointError, read_prefix
from mpl_scale.checkpoint.export import checkpoint_config
from mpl_scale.checkpoint.format import read_index
from mpl_scale.config import Config
from mpl_scale.mesh import Mesh
from mpl_scale.models import build_model
from mpl_scale.trainer.bad_input import value_on_main

NETWORKS = ("teacher", "student", "ema")


def load_network(checkpoint: Path, name: str | None, *, config: Config, mesh: Mesh) -> tuple[str, nn.Module]:
    """A network on this rank's device, in evaluation mode, and its name. Rank 0 reads; collective over the world.

    Args:
        checkpoint: the folder step_....
        name: of NETWORKS; None: the teacher, or the student where there is none.
        config: its `model` section is read.
        mesh: this rank's place.

    Raises:
        ValueError: a damaged checkpoint, one without the network, or of another architecture or number of classes.
    """
    network = value_on_main(mesh, lambda: _named(checkpoint, name))
    value_on_main(mesh, lambda: _refuse_other_views(checkpoint, config))
    kind = "teacher" if network == "teacher" else "student"
    section = getattr(config.model, kind)
    module = build_model(section, config.model, field=f"mpl_scale.model.{kind}", seed=0)

    def fill() -> None:
        state = _read(checkpoint, f"{network}/master") | _read(checkpoint, f"{network}/buffer")
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            problem = " ".join(str(error).splitlines()[1:2]).strip().rstrip(".")
            raise ValueError(
                f"--checkpoint {checkpoint}: its {network} is not the config's mpl_scale.model.{kind} with "
                f"num_classes = {config.model.num_classes}: {problem}; use the config it was trained with"
            ) from error

    value_on_main(mesh, fill)
    module = module.to(mesh.device).eval()
    if mesh.world_group is not None:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0, group=mesh.world_group)
    return network, module


def _refuse_other_views(checkpoint: Path, config: Config) -> None:
    """ValueError where the network would see images otherwise than it was trained on; a checkpoint may not say how."""
    try:
        trained = checkpoint_config(checkpoint)
    except CheckpointError:  # of an earlier version
        return
    for field, was, now in (
        ("data.mean", trained.data.mean, config.data.mean),
        ("data.std", trained.data.std, config.data.std),
        ("model.image_size", trained.model.image_size, config.model.image_size),
        ("model.bn_eps", trained.model.bn_eps, config.model.bn_eps),
    ):
        if was != now:
            raise ValueError(
                f"mpl_scale.{field} = {now}, but the network of --checkpoint {checkpoint} was trained with {was}; use "
                "the config it was trained with"
            )


def _named(checkpoint: Path, name: str | None) -> str:
    stored = {key.split("/")[0] for key in read_index(checkpoint).table}
    held = [network for network in NETWORKS if network in stored]
    if name is None and held:
        return held[0]
    if name not in held:
        raise ValueError(
            f"--network {name}: checkpoint {checkpoint} holds {', '.join(held) or 'no network'}; choose one"
        )
    return name


def _read(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """checkpoint.reader.read_prefix, or {} where the network has no such values (buffers, without batch norm)."""
    if not any(key.startswith(f"{prefix}/") for key in read_index(checkpoint).table):
        return {}
    return read_prefix(checkpoint, prefix)
