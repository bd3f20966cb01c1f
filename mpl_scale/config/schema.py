"""The "mpl_scale" section of a ds_config: every field, its default, its bounds and its source in the paper.

Models are frozen and refuse unknown keys. Checks across fields and against the world size are in checks.py. Data are in
schema_data.py and schema_views.py, methods and optimisers in schema_method.py; all sections can be imported from here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mpl_scale.config.schema_data import DataConfig, PlaceConfig
from mpl_scale.config.schema_method import (
    FeedbackConfig,
    FinetuneOptimConfig,
    MethodConfig,
    OptimConfig,
    OptimsConfig,
    UDAConfig,
)
from mpl_scale.config.schema_views import EvaluationConfig, StrongConfig, WeakConfig
from mpl_scale.config.section import (
    Count,
    CountOrZero,
    Positive,
    Probability,
    Seconds,
    Section,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FeedbackConfig",
    "FinetuneOptimConfig",
    "FinetunePhase",
    "GuardConfig",
    "LoggingConfig",
    "MethodConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimConfig",
    "OptimsConfig",
    "ParallelConfig",
    "PhasesConfig",
    "PlaceConfig",
    "Section",
    "StrongConfig",
    "TrainPhase",
    "UDAConfig",
    "WarmupPhase",
    "WeakConfig",
]

Recompute = Literal["none", "bn_act", "block"]


class NetworkConfig(Section):
    """One network: teacher or student."""

    name: str = Field(description="A registered model (mpl_scale.models) or any timm classifier.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout before the classifier.")
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Stochastic depth, deepest block.")
    init: Literal["default", "uniform", "zero_classifier"] = Field(
        "default", description="default: the model's own; uniform: U(-init_range, init_range) everywhere (3.1)."
    )
    init_range: Positive = 0.1
    frozen: list[str] = Field(
        [],
        description="Parts that are never trained: names of modules or parameters (layer1, blocks.0), patterns of them "
        "(blocks.*.attn), or timm's groups of layers (stem). Their batch norms normalise by their running averages.",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the model's builder, but for what other settings do."
    )
    weights: str | None = Field(
        None,
        description="Start from this model.safetensors, or the folder that holds it: of mpl-scale export, or any with "
        "the model's own keys; or timm: from those that timm publishes for the name and its tag.",
    )
    new_classifier: bool | Literal["auto"] = Field(
        "auto",
        description="Whether the classifier keeps its initial values where `weights` are loaded. auto: where their "
        "number of classes is another, which a line says; false refuses such weights.",
    )


class ModelConfig(Section):
    """The two networks and the settings that they share."""

    teacher: NetworkConfig
    student: NetworkConfig
    num_classes: Annotated[int, Field(ge=2, le=1 << 20)]
    image_size: Annotated[int, Field(ge=1, le=1 << 14)] = Field(
        description="Height and width of the images fed to the networks, pixels."
    )
    in_chans: Annotated[int, Field(ge=1, le=256)] = Field(
        3, description="Channels of the images fed to the networks: 1 grey, 3 RGB; others: of source arrays."
    )
    bn_decay: Probability = Field(
        0.99, description="Decay of BN's moving averages (Tables 6-8); torch momentum is 1 - decay."
    )
    bn_eps: Positive = 1e-3


class ParallelConfig(Section):
    """The device mesh, the engine and how steps are computed."""

    engine: Literal["auto", "deepspeed", "flat"] = Field(
        "auto", description="auto: flat for ZeRO 0-2 on a GPU, deepspeed otherwise."
    )
    width: Count = Field(1, description="Ranks that share one image along its width.")
    switch_at: str = Field(
        "auto",
        description="Where a split network goes over to whole images of fewer rows: auto (the first stage that a rank "
        "enters with fewer columns than a kernel has), never, or the path of a stage.",
    )
    empty_slices: bool = Field(
        True, description="Whether ranks may own no column where images are narrow; false refuses such a width."
    )
    halo: Literal["plain", "block_input"] = Field(
        "plain",
        description="What neighbours exchange: the input of each convolution (plain), or of each block, whose first "
        "convolution is then repeated on the halo (block_input: fewer bytes).",
    )
    teacher: Literal["auto", "live", "deferred"] = Field(
        "auto",
        description="live: the teacher's graph is kept while the student learns; deferred: the teacher runs again, "
        "with a graph, once the feedback is known (one forward pass more, no graph kept). auto: deferred with gradient "
        "accumulation.",
    )
    kernels: Literal["auto", "eager", "compiled"] = Field(
        "auto",
        description="Batch norm with its activation: as torch operators, or compiled into single loops that keep only "
        "their input. auto: compiled on a GPU.",
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        "auto", description="Layout of the images; auto: on where images are whole (width 1)."
    )
    recompute: Recompute | list[Recompute] = Field(
        "none",
        description="Activations recomputed in the backward pass: none, all but each block's input and dense "
        "convolutions (bn_act), or all but each block's input (block). A list gives one for each stage of the network.",
    )
    recompute_backend: Literal["native", "fairscale"] = Field(
        "native", description="Who recomputes; fairscale's is for whole blocks, outside CUDA graphs."
    )
    recompute_offload: bool = Field(False, description="fairscale: keep the blocks' inputs in the host's memory.")
    shard_size: Count | None = Field(None, description="Consecutive ranks that share one copy of the state; null: all.")
    graph: Literal["off", "auto", "required"] = Field("auto", description="Replay the step as one CUDA graph.")
    tf32: bool | Literal["auto"] = Field(
        "auto",
        description="Whether a GPU may round the factors of fp32 products and convolutions to TF32 (10 bits of "
        "mantissa). auto: yes, except where method.feedback.derivative is a difference, which needs fp32.",
    )
    deterministic: bool = Field(
        False,
        description="Only algorithms that give the same bits in every run: slower, and an operation that has none "
        "raises an error. false: cuDNN tries its algorithms and keeps the fastest.",
    )
    timeout_seconds: Seconds = Field(600.0, description="A collective that takes longer ends the run.")


class TrainPhase(Section):
    """The main phase, in which the configured method trains both networks."""

    steps: Count
    evaluate_every: CountOrZero = Field(0, description="0: only at the end of the phase.")


class WarmupPhase(Section):
    """Teacher warm-up: supervised + UDA on the teacher alone, before the main phase."""

    steps: CountOrZero = 0


class FinetunePhase(Section):
    """Finetuning of the student on labelled images (3.2, 3.3)."""

    steps: CountOrZero = 0
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    batch_size: Count | None = Field(None, description="Global labelled batch; null: train_batch_size.")
    start_from: Literal["student", "ema"] = "student"


class PhasesConfig(Section):
    """The phases of a run, in order: teacher warm-up, train, finetune."""

    teacher_warmup: WarmupPhase = WarmupPhase()
    train: TrainPhase
    finetune: FinetunePhase = FinetunePhase()


class LoggingConfig(Section):
    """What is written while training."""

    every: Count = Field(10, description="Steps between lines of metrics.jsonl.")
    progress: Literal["auto", "bar", "lines", "off"] = Field(
        "auto", description="auto: a bar on a terminal, else lines."
    )
    view_grid_every: CountOrZero = Field(
        0,
        description="Steps between pictures of weak and strong views with their pseudo labels, in the run's folder "
        "views/ ; 0: none. Not for vectors.",
    )
    labelled_loss_drop: bool = Field(
        False,
        description="Whether the student's loss on labelled images is measured before its update too, by one more "
        "forward pass at each step: `mpl-scale report` compares its drop with the sign of h. Trains the same networks.",
    )
    cost: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the bytes and the time of the main phase's steps are measured, and planned, for the "
        "summary. auto: on a GPU, whose allocator counts; on a CPU one step is counted storage by storage.",
    )


class CheckpointConfig(Section):
    """When the state is saved and what is kept."""

    every: CountOrZero = Field(1000, description="Steps between checkpoints; 0: only at the end and on SIGTERM.")
    keep: Count = Field(3, description="Newest checkpoints kept.")
    keep_every: CountOrZero = Field(
        0, description="Checkpoints of steps that it divides are kept too, for good; a multiple of `every`; 0: none."
    )
    asynchronous: bool = Field(False, description="Copy the state to host memory and write it in the background.")
    timeout_seconds: Seconds = Field(
        600.0, description="asynchronous: where a rank's file is not written by then, the checkpoint is given up."
    )

    @model_validator(mode="after")
    def _keep_some(self) -> Self:
        if self.every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every = {self.keep_every} is no multiple of every = {self.every}; use a multiple, or 0"
            )
        return self


class RewindConfig(Section):
    """When the loss has jumped: compared at logging steps, the student's, or the teacher's where it is alone."""

    factor: Annotated[float, Field(gt=1.0)] = Field(3.0, description="Times the mean of the lines before.")
    window: Count = Field(20, description="Lines averaged; nothing counts as a jump before that many lines.")
    patience: Count = Field(3, description="Lines in a row that must be above.")
    max_rewinds: Count = Field(3, description="Of a phase; one more jump stops the run.")
    skip_batches: bool = Field(
        True, description="Continue with the images that follow. false: the same again, for a loss spoilt by hardware."
    )


class GuardConfig(Section):
    """What ends a run that makes no progress."""

    hang_seconds: Seconds | None = Field(
        None,
        description="No step ended for that long: every rank writes its stacks, the rank that is behind is named, and "
        "the run ends with status 75. Above the slowest step, below parallel.timeout_seconds; null: off.",
    )
    nonfinite: Literal["off", "stop", "skip"] = Field(
        "stop",
        description="A metric (at logging steps) or weight (before checkpoints) that is NaN or infinite: stop, with "
        "the state saved in bad-<step>, not used for resuming. skip: a step with such a value changes nothing; "
        "costs a copy of the state.",
    )
    max_skipped: Count = Field(10, description="nonfinite = skip: this many skipped steps in a row stop the run.")
    rewind: RewindConfig | None = Field(
        None,
        description="Go back to a checkpoint when the loss jumps (docs/faults.md); null: off.",
    )


class Config(Section):
    """The "mpl_scale" section of a ds_config."""

    paper: str | None = Field(None, description="The row of the paper this config stands for.")
    imports: list[str] = Field(
        [], description="Your own modules (package.module), imported first: what they register can be named here."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimsConfig
    parallel: ParallelConfig = ParallelConfig()
    phases: PhasesConfig
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
