"""DeepSpeed as a library: its import, its process group, and the config an engine is given.

This and deepspeed_shards.py are the only places that know DeepSpeed; the import is delayed to `import_deepspeed`
because it costs seconds and settles the accelerator for the life of the process.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pydantic
import torch
import torch.distributed as dist

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


def picture_writer(monitor: Any) -> Callable[[str, np.ndarray, int], None] | None:
    """What shows a picture, (name, pixels uint8 [H, W, 3], step), in the TensorBoard of a `monitor_master`, if any."""
    board = monitor.tb_monitor
    return None if board is None else partial(board.summary_writer.add_image, dataformats="HWC")


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
