"""DeepSpeed as a library: its import, its process group, the config an engine is given, and what is refused.

This and deepspeed_shards.py are the only places that know DeepSpeed; the import is delayed to `import_deepspeed`
because it costs seconds and settles the accelerator for the life of the process.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pydantic
import torch
import torch.distributed as dist

from mpl_scale.config.deepspeed_keys import REFUSED_KEYS
from mpl_scale.mesh import Mesh

MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
OWNED_BY_TRAINER = (*MONITORS, "mpl_scale", "optimizer", "scheduler", "train_batch_size")
NEVER = 10**12
"""Steps between DeepSpeed's progress lines."""


def import_deepspeed(device_type: str | None = None) -> ModuleType:
    """DeepSpeed with the accelerator of that device type, without its JIT builds, logging warnings only.

    Args:
        device_type: "cpu" or "cuda"; None: what is settled already, else cuda if there is one.

    Raises:
        ValueError: the process has settled on the other accelerator.
    """
    if device_type is None:
        device_type = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import deepspeed
    from deepspeed.utils import logger

    settled = deepspeed.get_accelerator().device_name()
    if settled != device_type:
        raise ValueError(
            f"DeepSpeed was imported for {settled}, this run computes on {device_type}; "
            f"set DS_ACCELERATOR={device_type} in the environment"
        )
    if device_type == "cpu":  # else every op is test-compiled, and comm's shared-memory collectives are built
        deepspeed.ops.__compatible_ops__ = {}
    logger.setLevel(logging.WARNING)
    logger.addFilter(_not_about_our_optimizer)
    return deepspeed


def _not_about_our_optimizer(record: logging.LogRecord) -> bool:
    """Drop the warning, once per engine, that DeepSpeed's authors have not tested our optimisers: our tests do."""
    return "untested optimizer" not in record.getMessage()


def connect(device: torch.device) -> ModuleType:
    """DeepSpeed, talking through the process group of this process; a single process gets a group of its own."""
    deepspeed = import_deepspeed(device.type)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # read, but not used: the device is given
    deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def monitor_master(ds_config: Mapping[str, Any], *, device: torch.device | None = None) -> Any:
    """DeepSpeed's writer for the tensorboard, csv_monitor, wandb and comet sections; it writes on rank 0 only.

    The result has `enabled` and `write_events([(name, value, step), ...])`.
    """
    connect(device or torch.device(import_deepspeed().get_accelerator().device_name()))
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config({name: ds_config.get(name, {}) for name in MONITORS}))


def validate_ds_blocks(ds_config: Mapping[str, Any], *, device_type: str | None = None) -> None:
    """Check the values of the typed blocks with DeepSpeed's own models; names were checked when the file was read.

    Raises:
        ValueError: one line that names the field, e.g. `zero_optimization.stage = 7: ...`.
    """
    for path, model in ds_models(device_type).items():
        block: Any = ds_config
        for part in path.split("."):
            block = block.get(part) if isinstance(block, Mapping) else None
        if block is None:
            continue
        try:
            model(**block)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join([path, *map(str, first["loc"])])
            value = f" = {first['input']!r}" if first["loc"] else ""
            raise ValueError(f"{field}{value}: {first['msg']}") from None


def ds_models(device_type: str | None = None) -> dict[str, type[pydantic.BaseModel]]:
    """DeepSpeed's pydantic model of each block that has one, by the block's path."""
    import_deepspeed(device_type)
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def engine_config(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The user's config as one engine gets it: without what the trainer owns, quiet."""
    config = copy.deepcopy({key: value for key, value in ds_config.items() if key not in OWNED_BY_TRAINER})
    config.setdefault("train_micro_batch_size_per_gpu", 1)  # only logged: batches are the caller's
    config.setdefault("gradient_clipping", 0.0)  # DeepSpeed's default is 1.0
    config.setdefault("timers", {"throughput": {"enabled": False}})  # it synchronises the device
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("memory_efficient_linear", False)  # it replaces F.linear for the whole process
    config.setdefault("gradient_accumulation_steps", 1)
    config.update(
        steps_per_print=NEVER,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    return config


def refuse_unsupported(config: Mapping[str, Any], mesh: Mesh) -> None:
    """Refuse what would fail late or train wrongly in a step of two networks.

    Raises:
        ValueError: the field, its value, the reason and the fix.
    """
    for key, reason in REFUSED_KEYS.items():
        block = config.get(key)
        disabled = isinstance(block, Mapping) and block.get("enabled") is False
        if key in config and not disabled:
            raise ValueError(f"{key}: {reason}")
    zero = config["zero_optimization"]
    stage, replicated = zero.get("stage", 0), mesh.shard_size < mesh.world
    offload, offload_param = (zero.get(f"offload_{kind}") or {} for kind in ("optimizer", "param"))
    offloads = bool(zero.get("cpu_offload")) or offload.get("device", "none") != "none"
    shard_size = f"mpl_scale.parallel.shard_size = {mesh.shard_size} of {mesh.world} ranks"
    refusals = [
        (
            stage == 0 and replicated,
            f"{shard_size} shards the state, zero_optimization.stage = 0 does not; use stage 1, 2 or 3",
        ),
        (
            offloads and replicated,
            f"{shard_size}: with zero_optimization.offload_optimizer the gradient's norm is taken before replicas are "
            "averaged; drop one of the two",
        ),
        (offloads and stage == 0, "zero_optimization.offload_optimizer: stage 0 ignores it; use stage 1, 2 or 3"),
        (
            "nvme" in (offload.get("device"), offload_param.get("device")),
            "zero_optimization.offload_* to nvme: checkpoints and the EMA read the master weights in memory; use cpu",
        ),
        (
            offload.get("ratio", 1.0) < 1.0 or offload.get("super_offload"),
            "zero_optimization.offload_optimizer.ratio < 1 and super_offload need DeepSpeedCPUAdam; remove them",
        ),
        (
            zero.get("zenflow"),
            "zero_optimization.zenflow delays updates: the feedback must be taken at the updated student; remove it",
        ),
        (
            zero.get("zero_hpz_partition_size", 1) > 1,
            "zero_optimization.zero_hpz_partition_size > 1 keeps second copies of the weights that a loaded checkpoint "
            "does not reach; use mpl_scale.parallel.shard_size",
        ),
        (
            config.get("bf16", {}).get("bf16_master_weights_and_grads"),
            "bf16.bf16_master_weights_and_grads: master weights are fp32 here; remove it",
        ),
        (
            config.get("compile", {}).get("deepcompile"),
            "compile.deepcompile schedules one network with one backward per step, there are two; remove it",
        ),
        (
            config.get("data_types", {}).get("buffer_dtype"),
            "data_types.buffer_dtype: batch-norm statistics stay in fp32; remove it",
        ),
    ]
    for refused, message in refusals:
        if refused:
            raise ValueError(message)
