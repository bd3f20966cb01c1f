"""Every key that DeepSpeed 0.19.8 reads from a ds_config: its type, its range, and which engine honours it here.

Static tables: checking a file must not import DeepSpeed. tests/test_deepspeed_config.py compares them with the
installed one, docs/troubleshooting.md shows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Effect = Literal["run", "tuning", "engine", "ignored", "refused"]
"""Who honours a key.

run: every run. tuning: engine deepspeed; the flat engine ignores it with a warning, results are the same.
engine: engine deepspeed; refused with the flat engine. ignored: nobody; a warning. refused: nobody; the reason says
what to use.
"""
Kind = Literal["flag", "whole", "number", "text", "list", "section"]
KIND_NAMES = {
    "flag": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "a string",
    "list": "a list",
    "section": "a section {...}",
}


@dataclass(frozen=True)
class Key:
    """One key. A value equal to `default`, DeepSpeed's own, asks for nothing and is never refused or warned of.

    least, most: bounds, inclusive; above: exclusive lower bound. choices: all values. why: of refused keys, the reason
    and the fix.
    """

    kind: Kind
    effect: Effect
    default: Any = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] = ()
    why: str = ""

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, as "must be ..."; None: nothing."""
        if value is None and self.default is None:
            return None
        right = {
            "flag": lambda: isinstance(value, bool),
            "whole": lambda: _is_number(value) and math.isfinite(value) and value == int(value),  # 5e8 is one
            "number": lambda: _is_number(value) and math.isfinite(value),
            "text": lambda: isinstance(value, str),
            "list": lambda: isinstance(value, list),
            "section": lambda: isinstance(value, dict),
        }[self.kind]
        if not right():
            return f"must be {KIND_NAMES[self.kind]}"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above:g}"
        if self.least is not None and value < self.least:
            return f"must be at least {self.least:g}"
        if self.most is not None and value > self.most:
            return f"must be at most {self.most:g}"
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flags(effect: Effect, names: str, *, default: bool | None = False) -> dict[str, Key]:
    return {name: Key("flag", effect, default) for name in names.split()}


def _refused(why: str, names: Sequence[str] | str, *, kind: Kind = "section", default: Any = None) -> dict[str, Key]:
    names = names.split() if isinstance(names, str) else names
    return {name: Key(kind, "refused", default, why=why) for name in names}


REMOVED_KEYS = frozenset(
    {
        *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting"),
        *("nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    }
)
"""Keys of older releases, which DeepSpeed 0.19.8 refuses."""

_LANGUAGE_MODELS = "it belongs to language models; remove it"
_MESH = "the mesh is set in mpl_scale.parallel; remove it"
_CHECKPOINTS = "checkpoints are written by mpl_scale.checkpoint; use that section"
_DATA = "the data pipeline is mpl_scale.data; remove it"
_DTYPES = ("fp16", "bf16", "fp32")

TOP_LEVEL: dict[str, Key] = {
    "train_batch_size": Key("whole", "run", least=1),
    "train_micro_batch_size_per_gpu": Key("whole", "run", least=1),
    "gradient_accumulation_steps": Key("whole", "run", least=1),
    "gradient_clipping": Key("number", "run"),
    "communication_data_type": Key("text", "engine", choices=_DTYPES),
    "prescale_gradients": Key("flag", "engine", False),
    "gradient_predivide_factor": Key("number", "engine", 1.0, above=0),
    **_flags("engine", "disable_allgather"),
    **_flags("tuning", "disable_python_gc"),
    **_flags("ignored", "dump_state memory_breakdown wall_clock_breakdown zero_force_ds_cpu_optimizer"),
    "steps_per_print": Key("whole", "ignored"),
    "zero_allow_untested_optimizer": Key("flag", "ignored", True),
    "log_level": Key("text", "ignored"),
    **_refused("DeepSpeed 0.19.8 has removed it; remove it", sorted(REMOVED_KEYS)),
    **_refused("DeepSpeed 0.19.8 has removed it; use bf16", "amp"),
    **_refused(
        "teacher and student have one each; use mpl_scale.optim.teacher and mpl_scale.optim.student", "optimizer"
    ),
    **_refused(
        "teacher and student have one each; use mpl_scale.optim.teacher.schedule and .student.schedule", "scheduler"
    ),
    **_refused("loss scaling skips steps, and teacher and student must step together; use bf16", "fp16"),
    **_refused("it is the old name of bf16; use bf16", "bfloat16"),
    **_refused(
        "DeepSpeed keeps it in a global that both networks share; use bf16 (master weights are fp32)", "torch_autocast"
    ),
    **_refused("networks are not cut into pipeline stages; remove it", "pipeline"),
    **_refused(
        "the trainer decides when a gradient is applied or discarded; remove it", "managed_gradient_accumulation"
    ),
    **_refused("gradients are averaged over ranks, never summed; remove it", "gradient_allreduce_op"),
    **_refused("weights are bf16 or fp32; remove it", "weight_quantization"),
    **_refused(_LANGUAGE_MODELS, "hybrid_engine expert_parallel use_data_before_expert_parallelism vocabulary_size"),
    **_refused(_LANGUAGE_MODELS, "seq_parallel_communication_data_type"),
    **_refused(_MESH, "tensor_parallel sequence_parallel_size data_parallel_size"),
    **_refused("it restarts the script with its own configs; use `mpl-scale plan`", "autotuning"),
    **_refused(_CHECKPOINTS, "checkpoint datastates_ckpt"),
    **_refused(_DATA, "data_efficiency dataloader_drop_last"),
    **_refused("activations are recomputed by mpl_scale.parallel.recompute; use that", "activation_checkpointing"),
    **_refused("networks are compiled by mpl_scale.parallel.kernels; use that", "compile"),
    **_refused("only offloading to NVMe reads it, which is refused; remove it", "aio"),
    **_refused("use `mpl-scale plan` for FLOPs and `python -m benchmarks.throughput` for time", "flops_profiler"),
}
"""Keys that are no sections, and sections that are refused as a whole unless their `enabled` is false."""

_OFFLOAD = {
    "device": Key("text", "engine", "none", choices=("none", "cpu", "nvme")),
    "nvme_path": Key("text", "engine"),
}
_BUCKET = Key("whole", "tuning", least=0)
_NEW_NAME = "DeepSpeed has replaced it; use {}"
STAGE_3 = {
    "prefetch_bucket_size": replace(_BUCKET, default=50_000_000),
    "param_persistence_threshold": replace(_BUCKET, default=100_000),
    "model_persistence_threshold": _BUCKET,
    "max_live_parameters": replace(_BUCKET, default=1_000_000_000),
    "max_reuse_distance": replace(_BUCKET, default=1_000_000_000),
    "gather_16bit_weights_on_model_save": Key("flag", "ignored", False),
    "module_granularity_threshold": replace(_BUCKET, default=0),
    "use_all_reduce_for_fetch_params": Key("flag", "tuning", False),
    "allgather_sequential": Key("flag", "tuning", False),
}

_FILES = {"enabled": Key("flag", "run", False), **dict.fromkeys(("output_path", "job_name"), Key("text", "run"))}

SECTIONS: dict[str, dict[str, Key]] = {
    "zero_optimization": {
        "stage": Key("whole", "run", 0, choices=(0, 1, 2, 3)),
        "reduce_bucket_size": Key("whole", "tuning", 500_000_000, least=1),
        "allgather_bucket_size": replace(_BUCKET, default=500_000_000),
        "sub_group_size": replace(_BUCKET, default=1_000_000_000),
        "overlap_comm": Key("flag", "tuning"),
        **_flags(
            "tuning",
            "allgather_partitions compute_grad_norm contiguous_gradients ignore_unused_parameters "
            "override_module_apply reduce_scatter use_multi_rank_bucket_allreduce",
            default=True,
        ),
        **_flags("tuning", "enable_sanity_checks log_trace_cache_warnings parameter_alignment round_robin_gradients"),
        **_flags("engine", "legacy_stage1 zero_quantized_gradients zero_quantized_nontrainable_weights"),
        **_flags("engine", "zero_quantized_weights"),
        "memory_efficient_linear": Key("flag", "tuning"),  # off here unless it is asked for
        **_flags("ignored", "elastic_checkpoint pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory"),
        "load_from_fp32_weights": Key("flag", "ignored", True),
        "offload_optimizer": Key("section", "engine"),
        "offload_param": Key("section", "engine"),
        "leaf_module": Key("section", "engine"),
        **_refused("updates are delayed, but the feedback needs the updated student; remove it", "zenflow"),
        **_refused(
            "it keeps second copies of the weights that a loaded checkpoint does not reach; use "
            "mpl_scale.parallel.shard_size",
            "zero_hpz_partition_size",
            kind="whole",
            default=1,
        ),
        **_refused(_NEW_NAME.format("offload_optimizer"), "cpu_offload cpu_offload_use_pin_memory", kind="flag"),
        **_refused(_NEW_NAME.format("offload_param"), "cpu_offload_param", kind="flag"),
        "stage3_gather_fp16_weights_on_model_save": Key("flag", "ignored", False),
        **STAGE_3,
        **{f"stage3_{name}": key for name, key in STAGE_3.items()},
    },
    "zero_optimization.offload_optimizer": {
        **_OFFLOAD,
        "buffer_count": Key("whole", "engine", 4, least=0),
        "pin_memory": Key("flag", "engine", True),
        **_flags("engine", "fast_init pipeline_read pipeline_write super_offload"),
        "ratio": Key("number", "engine", 1.0, least=0, most=1),
        "cpuadam_cores_perc": Key("number", "engine", 0.8, least=0, most=1),
    },
    "zero_optimization.offload_param": {
        **_OFFLOAD,
        "buffer_count": Key("whole", "engine", 5, least=0),
        "buffer_size": Key("whole", "engine", 100_000_000, least=0),
        "max_in_cpu": Key("whole", "engine", 1_000_000_000, least=0),
        "pin_memory": Key("flag", "engine", True),
    },
    "bf16": {
        "enabled": Key("flag", "run", False),
        "check_grad_overflow": Key("flag", "tuning", True),
        **_flags("engine", "immediate_grad_update bf16_optimizer_states"),
        **_refused(
            "master weights are fp32 here; remove it", "bf16_master_weights_and_grads", kind="flag", default=False
        ),
    },
    "tensorboard": {
        "enabled": Key("flag", "run", False),
        **dict.fromkeys(("output_path", "job_name"), Key("text", "run")),
    },
    "csv_monitor": {
        "enabled": Key("flag", "run", False),
        **dict.fromkeys(("output_path", "job_name"), Key("text", "run")),
    },
    "wandb": {
        "enabled": Key("flag", "run", False),
        **dict.fromkeys(("group", "team", "project"), Key("text", "run")),
    },
    "comet": {
        **dict.fromkeys(("enabled", "online"), Key("flag", "run")),
        "samples_log_interval": Key("whole", "run", 100, least=1),
        **dict.fromkeys(("project", "workspace", "api_key", "experiment_name", "experiment_key"), Key("text", "run")),
        "mode": Key("text", "run", choices=("get", "create", "get_or_create")),
    },
    "comms_logger": {
        **_flags("ignored", "enabled verbose debug"),
        "prof_all": Key("flag", "ignored", True),
        "prof_ops": Key("list", "ignored"),
    },
    "timers": {"throughput": Key("section", "ignored")},
    "timers.throughput": {"enabled": Key("flag", "ignored"), "synchronized": Key("flag", "ignored", True)},
    "data_types": {
        "grad_accum_dtype": Key("text", "engine", choices=_DTYPES),
        "param_dtype": Key("text", "engine", choices=_DTYPES),
        "keep_in_fp32_modules": Key("list", "engine"),
        **_refused("batch-norm statistics stay in fp32; remove it", "buffer_dtype", kind="text"),
    },
}
"""Sections and their keys; a dotted name is a section inside a section."""

AUTO_FROM_BATCH = frozenset({"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"})
"""Where "auto" means that the batch equation gives the value."""
