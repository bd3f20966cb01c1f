"""What a configuration means on given ranks and devices: every `auto` gets its value here, once, with the reason.

The run, the planner, `mpl-scale check` and the benchmarks read the result; nobody asks the configuration again. The
rules for one setting (`choose_...`) are called elsewhere only where there is no run to resolve: for a plan's
alternatives, and for scoring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from mpl_scale.config import Batches, Config, RunConfig, check
from mpl_scale.config.checks import Engine, choose_derivative, choose_engine, zero_stage
from mpl_scale.config.deepspeed_half import without_effect
from mpl_scale.config.readers import FED_BACK
from mpl_scale.config.schema import ParallelConfig

if TYPE_CHECKING:
    from mpl_scale.device import Numerics
    from mpl_scale.models.kernels import Mode

CONFIGURED = "as configured"
CONVERGED = 5.0
"""Times that batch norm's averages must be renewed, in units of 1 / (1 - bn_decay) steps."""


@dataclass(frozen=True)
class Resolved:
    """The settings as they take effect.

    device: cuda or cpu. shard_size: ranks that share one copy of the state, as the mesh has it. replayed: the step is
    a CUDA graph. cost: bytes and times are measured. why: the reason for each of `values`. warnings: what will work,
    but badly.
    """

    batches: Batches
    device: str
    engine: Engine
    stage: int
    shard_size: int
    kernels: Mode
    channels_last: bool
    replayed: bool
    deferred_teacher: bool
    derivative: Literal["jvp", "difference", "none"]
    bf16: bool
    numerics: Numerics
    cost: bool
    why: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a step."""
        return self.batches.micro_batches

    @property
    def eager_because(self) -> str | None:
        """Why the step is not replayed; None: it is."""
        return None if self.replayed else self.why["graph"]

    def values(self) -> dict[str, str]:
        """Each setting by name, for people."""
        return {
            "engine": self.engine,
            "ZeRO": f"stage {self.stage}" + (f" over shards of {self.shard_size}" if self.stage else ""),
            "kernels": self.kernels,
            "layout": "channels-last" if self.channels_last else "contiguous",
            "graph": "replayed" if self.replayed else "eager",
            "teacher": "deferred" if self.deferred_teacher else "live",
            "derivative": self.derivative,
            "micro-batches": str(self.micro_batches),
            "precision": "bf16" if self.bf16 else "fp32",
            "TF32": "on" if self.numerics.tf32 else "off",
            "algorithms": "deterministic" if self.numerics.deterministic else "fastest",
            "cost": "measured" if self.cost else "not measured",
        }

    def table(self) -> list[str]:
        """A line for each setting: its value and the reason."""
        return [f"  {name:<14}{value:<28}{self.why[name]}" for name, value in self.values().items()]

    def notes(self) -> list[str]:
        """Two lines at the start of a run: the values, and the reasons for those that were left open."""
        values = self.values()
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        reasons = "; ".join(f"{name} {why}" for name, why in self.why.items() if why != CONFIGURED)
        lines = [f"on {self.device}: {shown}", *([f"why: {reasons}"] if reasons else [])]
        return lines + [f"warning: {line}" for line in self.warnings]

    def summary(self) -> dict[str, Any]:
        """For summary.json: {name: {"value", "why"}}."""
        return {name: {"value": value, "why": self.why[name]} for name, value in self.values().items()}


def resolve(run: RunConfig, *, world: int, device: str) -> Resolved:
    """Check a configuration and resolve it.

    Args:
        run: as loaded.
        world: ranks.
        device: what they compute on, cuda or cpu.

    Raises:
        ValueError: as `check`; graph = required where the step cannot be captured.
    """
    batches, cuda = check(run, world=world, cuda=device == "cuda"), device == "cuda"
    # torch: seconds, once the configuration is known to be good
    import torch

    from mpl_scale.engine.graph import why_not_captured

    parallel, stage = run.mpl.parallel, zero_stage(run)
    engine, why_engine = choose_engine(parallel.engine, stage=stage, cuda=cuda)
    shard_size, why_shards = _shards(parallel, engine, stage=stage, world=world)
    kernels, why_kernels = choose_kernels(parallel, device)
    channels_last, why_layout = choose_layout(parallel, device)
    eager_because = why_not_captured(
        graph=parallel.graph,
        device=torch.device(device),
        flat_engine=engine == "flat",
        recompute_backend=parallel.recompute_backend,
    )
    deferred, why_teacher = _teacher(run, batches)
    derivative, why_derivative = choose_derivative(run)
    numerics, why_tf32 = choose_numerics(run.mpl, device, shifts=derivative == "difference")
    cost, why_cost = _cost(run.mpl, cuda=cuda)
    why_captured = "auto: engine flat on a GPU" if parallel.graph == "auto" else CONFIGURED
    bf16 = bool(run.deepspeed.get("bf16", {}).get("enabled", False))
    return Resolved(
        batches=batches,
        device=device,
        engine=engine,
        stage=stage,
        shard_size=shard_size,
        kernels=kernels,
        channels_last=channels_last,
        replayed=eager_because is None,
        deferred_teacher=deferred,
        derivative=derivative,
        bf16=bf16,
        numerics=numerics,
        cost=cost,
        why={
            "engine": why_engine,
            "ZeRO": why_shards,
            "kernels": why_kernels,
            "layout": why_layout,
            "graph": eager_because or why_captured,
            "teacher": why_teacher,
            "derivative": why_derivative,
            "micro-batches": CONFIGURED,
            "precision": CONFIGURED,
            "TF32": why_tf32,
            "algorithms": CONFIGURED,
            "cost": why_cost,
        },
        warnings=(
            *run.notes,
            *_warnings(run.mpl, device, bf16=bf16),
            *without_effect(run.deepspeed, flat=engine == "flat"),
        ),
    )


def choose_kernels(parallel: ParallelConfig, device: str) -> tuple[Mode, str]:
    """`parallel.kernels`, resolved, and why.

    A GPU's loops are compiled by Triton, which comes with torch's builds for CUDA. Where torch is built without CUDA,
    the GPUs are another machine's, and so is its Triton. On a CPU convolutions take three quarters of a step, so loops
    cannot gain much: a compiled WideResNet-28-2 step takes 0.99 of the eager one's time on an Intel Xeon with AVX-512
    and 1.11 of it on an AMD EPYC without, after up to a minute of a C++ compiler.
    """
    if parallel.kernels != "auto":
        return parallel.kernels, CONFIGURED
    if device != "cuda":
        return "eager", "auto: on a CPU compiled loops gain nothing"
    import torch

    if torch.version.cuda is None or find_spec("triton") is not None:
        return "compiled", "auto: a GPU with Triton"
    return "eager", "auto: Triton is not installed"


def choose_layout(parallel: ParallelConfig, device: str) -> tuple[bool, str]:
    """`parallel.channels_last`, resolved, and why."""
    if parallel.channels_last != "auto":
        return parallel.channels_last == "on", CONFIGURED
    if parallel.width > 1:
        return False, f"auto: images are split over {parallel.width} ranks"
    return True, "auto: whole images, whose convolutions are faster so"


def choose_numerics(config: Config, device: str, *, shifts: bool = False) -> tuple[Numerics, str]:
    """`parallel.deterministic` and `parallel.tf32`, resolved, and why TF32. shifts: the feedback takes a difference.

    It is on by default because timm's train.py turns it on, and torch does for convolutions.
    """
    from mpl_scale.device import Numerics

    wanted, deterministic = config.parallel.tf32, config.parallel.deterministic
    if device != "cuda":
        tf32, why = False, "a GPU's format" if wanted else CONFIGURED
    elif wanted != "auto":
        tf32, why = wanted, CONFIGURED
    elif shifts:
        tf32, why = False, f"auto: rule {config.method.feedback.rule} takes a central difference"
    else:
        tf32, why = True, "auto: for products of fp32 on a GPU"
    return Numerics(tf32=tf32, deterministic=deterministic), why


def _shards(parallel: ParallelConfig, engine: Engine, *, stage: int, world: int) -> tuple[int, str]:
    """Ranks of a shard group. The flat engine's stage 0 is a group of one rank; DeepSpeed's has the whole world."""
    if engine == "flat" and stage == 0:
        if parallel.shard_size not in (None, 1):
            return 1, f"stage 0 shards nothing: mpl_scale.parallel.shard_size = {parallel.shard_size} has no effect"
        return 1, CONFIGURED
    return parallel.shard_size or world, CONFIGURED


def _teacher(run: RunConfig, batches: Batches) -> tuple[bool, str]:
    """Whether the teacher's graph is built once the feedback is known."""
    wanted, method = run.mpl.parallel.teacher, run.mpl.method.name
    deferred = wanted == "deferred" or (wanted == "auto" and batches.micro_batches > 1)
    if method not in FED_BACK:
        return deferred, f"of no effect: method {method} gives its teacher no feedback"
    if wanted != "auto":
        return deferred, CONFIGURED
    return deferred, f"auto: {batches.micro_batches} micro-batch{'es' if batches.micro_batches > 1 else ''}"


def _cost(config: Config, *, cuda: bool) -> tuple[bool, str]:
    """Whether the plan of a run is measured."""
    if config.logging.cost != "auto":
        return config.logging.cost == "on", CONFIGURED
    return cuda, "auto: a GPU's allocator counts" if cuda else "auto: on a CPU counting takes time"


def _short_average(config: Config) -> str | None:
    """Statistics start at mean 0 and variance 1: after 5 / (1 - decay) steps e^-5, 0.7%, of that is left."""
    steps, decay = config.phases.train.steps, config.model.bn_decay
    if round(steps * (1.0 - decay), 6) >= CONVERGED:
        return None
    fitting = max(0.0, math.floor(1000 * (1.0 - CONVERGED / steps)) / 1000)
    return (
        f"mpl_scale.model.bn_decay = {decay:g} is too slow for phases.train.steps = {steps}: evaluation "
        f"would use statistics that have not converged; set bn_decay = {fitting:g} or train for "
        f"{math.ceil(CONVERGED / (1.0 - decay))} steps"
    )


def _warnings(config: Config, device: str, *, bf16: bool) -> tuple[str, ...]:
    """What works, but not as one may think."""
    from mpl_scale.device import emulates_bf16

    found = [_short_average(config)]
    if bf16 and emulates_bf16(device):
        cpu = device == "cpu"
        units = "processor has no bf16 instructions (avx512_bf16, amx_bf16)" if cpu else "GPU has no bf16 units"
        found.append(
            f"bf16.enabled = true, but this {units}: bf16 is emulated, many times slower than fp32; set it to false"
        )
    return tuple(line for line in found if line is not None)
