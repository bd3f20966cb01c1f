"""The DeepSpeed half of a config: what is known, refused, checked and handed to an engine; the monitors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpl_scale.config.deepspeed_keys import BLOCK_KEYS, REFUSED_KEYS, REMOVED_KEYS, TOP_LEVEL_KEYS
from mpl_scale.engine.deepspeed_setup import (
    ds_models,
    engine_config,
    import_deepspeed,
    monitor_master,
    refuse_unsupported,
    validate_ds_blocks,
)
from mpl_scale.mesh import Mesh, build_mesh

CPU = torch.device("cpu")


def mesh_of(world: int, shard_size: int) -> Mesh:
    """A mesh without groups, for checks that come before any collective."""
    mesh = build_mesh(device=CPU)
    return Mesh(**{**mesh.__dict__, "world": world, "shard_size": shard_size})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 0}}, "stage = 0"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"bf16": {"bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 2}}, "bf16_master"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}, "offload_optimizer": None}, "amp": {}}, "amp"),
    ],
)
def test_unsupported_settings_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        refuse_unsupported(engine_config(config), mesh_of(4, 2))


def test_what_is_off_or_plain_is_not_refused() -> None:
    refuse_unsupported(engine_config({"fp16": {"enabled": False}, "optimizer": {"type": "SGD"}}), mesh_of(4, 4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 7}}, r"zero_optimization\.stage = 7"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            r"offload_optimizer\.device = 'gpu'",
        ),
        ({"bf16": {"enabled": "maybe"}}, r"bf16\.enabled = 'maybe'"),
        ({"timers": {"throughput": {"enabled": 3}}}, r"timers\.throughput\.enabled"),
    ],
)
def test_block_errors_name_the_field_on_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        validate_ds_blocks(config, device_type="cpu")
    assert "\n" not in str(error.value)


def test_valid_blocks_pass() -> None:
    validate_ds_blocks(
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16": {"enabled": True}}
        | {"timers": {"throughput": {"enabled": False}}},
        device_type="cpu",
    )


class Recorder(dict):
    """A config that notes which keys are looked up in it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Recorder:
        return self


def test_top_level_keys_are_those_deepspeed_reads() -> None:
    import_deepspeed("cpu")
    from deepspeed.runtime import config as ds

    config = Recorder({"train_micro_batch_size_per_gpu": 1})
    ds.DeepSpeedConfig(config)
    elsewhere = {"data_parallel_size", "sequence_parallel_size", "tensor_parallel"}  # deepspeed.initialize
    internal = {"model_info"}  # written by the autotuner
    assert (config.seen | elsewhere) - internal - set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS) == TOP_LEVEL_KEYS
    assert set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS) == REMOVED_KEYS
    assert REFUSED_KEYS.keys() <= TOP_LEVEL_KEYS | REMOVED_KEYS


def test_block_keys_are_those_deepspeed_reads() -> None:
    for path, model in ds_models("cpu").items():
        fields = model.model_fields
        names = set(fields) | {f.alias for f in fields.values() if f.alias}
        assert names == BLOCK_KEYS[path], path

    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert set(ACT_CHKPT_DEFAULT) == BLOCK_KEYS["activation_checkpointing"]
    assert set(AIO_DEFAULT_DICT) == BLOCK_KEYS["aio"]
    block = Recorder()
    DeepSpeedFlopsProfilerConfig({"flops_profiler": block})
    assert block.seen == BLOCK_KEYS["flops_profiler"]


def test_monitor_writes_csv(tmp_path) -> None:  # type: ignore[no-untyped-def]
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    monitor = monitor_master({"csv_monitor": section, "zero_optimization": {"stage": 1}}, device=CPU)
    monitor.write_events([("loss", 0.5, 3)])
    assert monitor.enabled
    assert any("0.5" in path.read_text() for path in tmp_path.rglob("*.csv"))
