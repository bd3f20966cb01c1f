"""One engine for one network, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from mpl_scale.config.schema import OptimConfig
from mpl_scale.engine.flat_engine import FlatNetwork
from mpl_scale.mesh import Mesh
from mpl_scale.models.kernels import Mode
from mpl_scale.mpl import Network


def build_network(
    module: nn.Module,
    *,
    engine: Literal["flat", "deepspeed"],
    optim: OptimConfig,
    ds_config: Mapping[str, Any],
    mesh: Mesh,
    kernels: Mode = "eager",
) -> Network:
    """Put a module under ZeRO.

    Args:
        module: with its initial weights, the same on every rank, on the mesh's device.
        engine: which implementation.
        optim: optimiser settings of this network.
        ds_config: DeepSpeed's half of the configuration; the flat engine reads bf16, gradient_clipping and
            gradient_accumulation_steps, the mesh has the shard group.
        mesh: groups and device.
        kernels: for the flat engine's optimiser.
    """
    if engine == "deepspeed":
        from mpl_scale.engine.deepspeed_engine import DeepSpeedNetwork  # imports deepspeed: 4 s and more

        return DeepSpeedNetwork(module, optim=optim, ds_config=ds_config, mesh=mesh)
    bf16 = ds_config.get("bf16", {}).get("enabled", False)
    return FlatNetwork(
        module,
        optim=optim,
        mesh=mesh,
        dtype=torch.bfloat16 if bf16 else None,
        gradient_clipping=max(0.0, float(ds_config.get("gradient_clipping", 0.0))),  # below 0: off, as in DeepSpeed
        kernels=kernels,
        accumulates=ds_config.get("gradient_accumulation_steps", 1) > 1,
    )
