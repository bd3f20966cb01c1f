"""A checkpoint as a run writes it, of one network, and what an exported network must give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mpl_scale.checkpoint import replicated_entries, save
from mpl_scale.checkpoint.export import read_network
from mpl_scale.config import Config, load_config
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from tests.support.configs import tiny, write

# Sums in another order, and variances moved by 1e-3: some hundred float32 roundings of 6e-8 of the largest logit.
TOLERANCE = 1e-5


def checkpoint_of(
    folder: Path,
    *,
    long: bool = False,
    imports: tuple[str, ...] = (),
    about: dict[str, Any] | None = None,
    **network: Any,
) -> tuple[Path, Config]:
    """A checkpoint whose student has statistics of its own, as a run writes it; long: from a millionth to a hundred.

    about: more of its metadata.
    """
    raw = tiny()
    raw["mpl_scale"]["imports"] = list(imports)
    raw["mpl_scale"]["model"]["student"] = network
    raw["mpl_scale"]["model"]["image_size"] = 32
    run = load_config(write(folder, raw))
    torch.manual_seed(0)
    module = build_model(run.mpl.model.student, run.mpl.model, field="student", seed=5)
    buffers = dict(module.named_buffers())
    for name, buffer in buffers.items():
        if name.endswith("running_mean"):
            buffer.normal_(std=3.0 if long else 0.1)
        elif name.endswith("running_var"):
            buffer.copy_(10 ** buffer.uniform_(-6.0, 2.0)) if long else buffer.uniform_(0.001, 1.5)
    mesh = build_mesh(device=torch.device("cpu"))
    entries = replicated_entries("student/master", {k: p.detach() for k, p in module.named_parameters()}, mesh=mesh)
    entries += replicated_entries("student/buffer", buffers, mesh=mesh)
    metadata = {"phase": "train", "phase_step": 3, "config": run.resolved(), **(about or {})}
    return save(folder / "checkpoints", step=3, entries=entries, metadata=metadata, mesh=mesh, keep=1), run.mpl


def built(config: Config, checkpoint: Path) -> torch.nn.Module:
    module = build_model(config.model.student, config.model, field="student", seed=0)
    module.load_state_dict(read_network(checkpoint, "student"))
    return module.eval()


@torch.no_grad()
def assert_same_logits(ours: torch.nn.Module, other: torch.nn.Module, tolerance: float = TOLERANCE) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = ours(images)
    assert expected.std() > 1e-3  # or a network that ignores its weights would pass
    assert (other.eval()(images) - expected).abs().max() <= tolerance * expected.abs().max()


MODELS = [
    {"name": "resnet10t"},  # torch's eps of batch norm, ours is 1e-3
    {"name": "test_efficientnet", "kwargs": {"act_layer": "relu"}, "dropout": 0.2, "drop_path": 0.1},
]
