"""The DeepSpeed half of a config: what is known, refused, checked and handed to an engine; the monitors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpl_scale.config import check, load_config
from mpl_scale.config.deepspeed_half import refuse_combinations, refuse_without_effect, validated, without_effect
from mpl_scale.config.deepspeed_keys import REMOVED_KEYS, SECTIONS, TOP_LEVEL
from mpl_scale.config.reference import deepspeed_reference
from mpl_scale.config.schema import Config
from mpl_scale.engine.deepspeed_setup import (
    ds_models,
    import_deepspeed,
    monitor_master,
    validate_ds_blocks,
)
from tests.support.configs import DIGITS, tiny, write

CPU = torch.device("cpu")


def half(config: dict[str, Any]) -> dict[str, Any]:
    return validated(config, path=Path("c.json"))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 2 ignores it"),
        ({"zero_optimization": {"stage": 0}}, "stage = 0"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}}, "DeepSpeedCPUAdam"),
    ],
)
def test_combinations_that_fail_late_or_train_wrongly_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        refuse_combinations(half(config), shard_size=2, world=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_clipping": "auto"}, 'gradient_clipping = "auto": only Hugging Face'),
        ({"gradient_clipping": float("nan")}, "gradient_clipping = nan: must be a number"),
        ({"gradient_clipping": True}, "gradient_clipping = True: must be a number"),
        ({"bf16": {"enabled": "false"}}, "bf16.enabled = 'false': must be true or false"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled = 1: must be true or false"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled = "auto"'),
        ({"bf16": True}, "bf16 = True: must be a section"),
        ({"train_batch_size": 40.5}, "train_batch_size = 40.5: must be a whole number"),
        ({"train_batch_size": 0}, "train_batch_size = 0: must be at least 1"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor = 0: must be above 0"),
        ({"communication_data_type": "fp17"}, "communication_data_type = 'fp17': must be one of fp16, bf16, fp32"),
        ({"data_types": {"grad_accum_dtype": "float99"}}, "grad_accum_dtype = 'float99': must be one of"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4: must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = True: must be a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size = 0: must be at least 1"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload: DeepSpeed has replaced it; use offload_optimizer"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow: updates are delayed"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size: "),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            'offload_optimizer.devise"; did you mean device',
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "use mpl_scale.parallel.recompute|recompute; use that",
        ),
        (
            {"flops_profiler": {"enabled": True}, "optimizer": {}},
            "flops_profiler: .*optimizer: |optimizer: .*flops_profiler: ",
        ),
        ({"fp16": {"enabled": True}}, "fp16: loss scaling"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: "),
        ({"tensorboard": {"enabled": "yes"}}, "tensorboard.enabled = 'yes': must be true or false"),
    ],
)
def test_bad_values_are_refused_by_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        half(config)
    assert "\n" not in str(error.value)


def test_what_is_off_is_not_refused_and_known_autos_are_left_to_us() -> None:
    given = {
        "train_batch_size": 40.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "fp16": {"enabled": False},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": 1e9, "offload_param": None},
        "bf16": None,
    }
    found = half(given)
    assert found["train_batch_size"] == 40
    assert found["zero_optimization"]["sub_group_size"] == 10**9
    assert "reduce_bucket_size" not in found["zero_optimization"]
    assert not {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16"} & found.keys()
    refuse_without_effect(found, flat=True)
    assert without_effect(found, flat=True) == []


def test_what_the_flat_engine_does_not_have_is_refused_or_warned_of() -> None:
    found = half(
        {"prescale_gradients": True, "zero_optimization": {"stage": 2, "overlap_comm": False}, "dump_state": True}
    )
    with pytest.raises(ValueError, match="prescale_gradients: this run uses engine flat"):
        refuse_without_effect(found, flat=True)
    refuse_without_effect(found, flat=False)
    assert without_effect(half({"gradient_clipping": -1}), flat=True)[0].startswith("gradient_clipping = -1: below 0")
    both, tuning = without_effect(found, flat=True)
    assert both.startswith("dump_state: no effect here")
    assert tuning.startswith("zero_optimization.overlap_comm: no effect with engine flat")
    assert without_effect(found, flat=False) == [both]


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
    ours = {*TOP_LEVEL, *(name for name in SECTIONS if "." not in name)}
    assert (config.seen | elsewhere | REMOVED_KEYS) - internal == ours
    assert set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS) == REMOVED_KEYS


def test_keys_types_bounds_and_defaults_are_deepspeeds() -> None:
    """Ours are never wider than DeepSpeed's, so that what is accepted here does not fail there."""
    for path, model in ds_models("cpu").items():
        if path not in SECTIONS:
            continue  # refused as a whole
        fields = model.model_fields
        assert {*fields, *(f.alias for f in fields.values() if f.alias)} == SECTIONS[path].keys(), path
        for name, key in SECTIONS[path].items():
            field = fields.get(name) or next(f for f in fields.values() if f.alias == name)
            for value in (key.least, key.most, key.default):
                if value is not None and key.effect != "refused" and key.kind != "section":
                    model(**{name: value})
            if key.default is not None and not field.is_required():
                assert key.default == getattr(field.default, "value", field.default), f"{path}.{name}"


def test_the_table_of_keys_is_that_of_the_documentation() -> None:
    assert deepspeed_reference() in (DIGITS.parents[1] / "docs" / "troubleshooting.md").read_text()


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**10), st.floats(), st.sampled_from(["auto", "", "cpu", "true", "mpl"])
)
JSON = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from(["enabled", "stage", "x"]), SCALARS, max_size=2),
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """The tiny configuration with some fields of either half replaced or added; about half of them are still valid."""
    raw = tiny()
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            where, name = draw(st.sampled_from(DEEPSPEED_FIELDS))
        else:
            where, name = draw(st.sampled_from(OUR_FIELDS))
        target = raw
        for part in where:
            target = target.setdefault(part, {}) if isinstance(target, dict) else {}
        if isinstance(target, dict):
            target[name] = draw(JSON)
    return raw


def _fields(model: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, field in model.model_fields.items():
        yield path, name
        inner = next((a for a in (field.annotation, *get_args(field.annotation)) if hasattr(a, "model_fields")), None)
        if inner is not None:
            yield from _fields(inner, (*path, name))


OUR_FIELDS = [field for field in _fields(Config, ("mpl_scale",)) if field[1] != "imports"]
DEEPSPEED_FIELDS = [((), name) for name in [*TOP_LEVEL, *SECTIONS] if "." not in name] + [
    (tuple(where.split(".")), name) for where, keys in SECTIONS.items() for name in keys
]


@settings(
    max_examples=int(os.environ.get("MPL_SCALE_FUZZ", "300")), deadline=None, suppress_health_check=list(HealthCheck)
)
@given(raw=configs(), world=st.sampled_from([1, 2, 4]), cuda=st.booleans())
def test_no_configuration_ends_in_a_traceback(raw: dict[str, Any], world: int, cuda: bool) -> None:
    """Loading and checking either work or say in one line what is wrong. MPL_SCALE_FUZZ=20000 tries more."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), raw)
        said = ""
        try:
            run = load_config(path)
            check(run, world=world, cuda=cuda)
        except ValueError as error:
            said = str(error)
        else:
            without_effect(run.deepspeed, flat=True)
            json.dumps(run.resolved(), allow_nan=False)
        assert "\n" not in said


def test_monitor_writes_csv(tmp_path) -> None:  # type: ignore[no-untyped-def]
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    monitor = monitor_master({"csv_monitor": section, "zero_optimization": {"stage": 1}}, device=CPU)
    monitor.write_events([("loss", 0.5, 3)])
    assert monitor.enabled
    assert any("0.5" in path.read_text() for path in tmp_path.rglob("*.csv"))
