"""What a run costs before it runs: multiply-accumulates, bytes kept for backward, static bytes per rank."""

from mpl_scale.planner.activations import StorageCensus, kept_bytes, to_compute_dtype
from mpl_scale.planner.macs import StepImages, count_macs, step_flops
from mpl_scale.planner.static import EngineSettings, TrainedNetwork, reachable_bytes, static_bytes

__all__ = [
    "EngineSettings",
    "StepImages",
    "StorageCensus",
    "TrainedNetwork",
    "count_macs",
    "kept_bytes",
    "reachable_bytes",
    "static_bytes",
    "step_flops",
    "to_compute_dtype",
]
