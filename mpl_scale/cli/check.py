"""`mpl-scale check`: validate a configuration and say what it costs, without its data, a GPU, or other ranks.

Both networks are built at full size on the meta device, split and recomputed as the config says, which finds what no
schema can: an image size a network cannot take, a width it cannot be split by, stages that have no policy.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mpl_scale.cli.command import Command, add_config_options, load, positive
from mpl_scale.config import Batches, RunConfig, check
from mpl_scale.config.checks import uses_flat_engine, zero_stage

if TYPE_CHECKING:
    import torch

    from mpl_scale.planner.footprint import NetworkCost
    from mpl_scale.trainer.phases import Phase

GIGA = 1e9
NOT_COUNTED = (
    "not counted: halos, workspaces, the block that is being recomputed, fragmentation; batch norm is reckoned as "
    "torch operators, compiled kernels keep less"
)


def _options(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    parser.add_argument("--world", type=positive, default=1, metavar="N", help="number of ranks")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what the ranks will compute on (default: cuda; none is needed here): it decides what engine auto means",
    )


def _run(options: argparse.Namespace) -> int:
    for line in report(load(options), world=options.world, cuda=options.device == "cuda"):
        print(line, flush=True)
    return 0


def report(run: RunConfig, *, world: int, cuda: bool) -> list[str]:
    """Check everything that needs no data, then say in lines: batch equation, networks, memory per rank and phase.

    Args:
        run: as loaded.
        world: ranks.
        cuda: whether they compute on GPUs.

    Raises:
        ValueError: names the field, the value and the fix.
    """
    batches = check(run, world=world, cuda=cuda)
    # torch and timm: seconds, once the config is known to be good
    import torch

    from mpl_scale.planner.footprint import network_cost
    from mpl_scale.trainer.input import check_models, check_names
    from mpl_scale.trainer.phases import plan_phases

    check_names(run)
    check_models(run)
    config, flat = run.mpl, uses_flat_engine(run, cuda=cuda)
    dtype = torch.bfloat16 if run.deepspeed.get("bf16", {}).get("enabled", False) else torch.float32
    costs: dict[str, NetworkCost] = {}
    for name in ("teacher", "student"):
        section = getattr(config.model, name).model_copy(update={"dropout": 0.0})  # of one layer: it costs nothing
        alike = costs and section == config.model.teacher.model_copy(update={"dropout": 0.0})
        costs[name] = (
            costs["teacher"]
            if alike
            else network_cost(
                section, config.model, field=f"mpl_scale.model.{name}", parallel=config.parallel, dtype=dtype
            )
        )
    size, width, shard = config.model.image_size, config.parallel.width, config.parallel.shard_size or world
    lines = [
        batches.equation(),
        f"{world} ranks = data {batches.data_ranks} x width {width}; engine {'flat' if flat else 'deepspeed'}, ZeRO "
        f"stage {zero_stage(run)} over shards of {shard if zero_stage(run) else 1}",
    ]
    for name, cost in costs.items():
        lines.append(
            f"{name}: {getattr(config.model, name).name}, {cost.parameters / 1e6:.1f} M parameters, "
            f"{cost.macs / GIGA:.3g} GMAC an image of {size}x{size}, {cost.kept_per_image / 1e6:.1f} MB of activations"
        )
    phases = plan_phases(config, batches, max_steps=None)
    lines += [_memory(phase, run, batches, costs, world=world, flat=flat, dtype=dtype) for phase in phases]
    return [*lines, NOT_COUNTED]


def _memory(
    phase: Phase,
    run: RunConfig,
    batches: Batches,
    costs: dict[str, NetworkCost],
    *,
    world: int,
    flat: bool,
    dtype: torch.dtype,
) -> str:
    """One line: what a phase keeps on each rank."""
    from mpl_scale.planner import static_bytes
    from mpl_scale.planner.footprint import kept_activations

    parallel, parts = run.mpl.parallel, phase.micro_batches
    state = {}
    for name, needed, optim in (
        ("teacher", phase.method.teacher, phase.optim.teacher),
        ("student", phase.method.student, phase.optim.student),
    ):
        if needed:
            found = static_bytes(
                costs[name].parameters,
                costs[name].buffers,
                stage=zero_stage(run),
                shard_size=parallel.shard_size or world,
                engine="flat" if flat else "deepspeed",
                weights_dtype=dtype,
                optimizer=optim.name,
                ema=name == "student" and phase.settings.ema_decay > 0,
                kept_gradients=2 if name == "student" else 1,
                clipping=run.deepspeed.get("gradient_clipping", 0.0) > 0,
                accumulation=parts > 1,
            )
            state[name] = sum(found.values())
    share = batches.data_ranks * parts  # micro-batches in a step, over all data ranks
    deferred = parallel.teacher == "deferred" or (parallel.teacher == "auto" and parts > 1)
    labelled, unlabelled = phase.labelled // share, phase.unlabelled // share
    activations = kept_activations(
        phase.method,
        teacher=costs["teacher"].kept_per_image,
        student=costs["student"].kept_per_image,
        labelled=labelled,
        unlabelled=unlabelled,
        student_sees_labelled=phase.settings.student_sees_labelled,
        deferred=deferred,
    )
    activations /= parallel.width
    of_networks = ", ".join(f"{name} {size / GIGA:.2f}" for name, size in state.items())
    total = (sum(state.values()) + activations) / GIGA
    return (
        f"phase {phase.name} ({phase.method.name}, {phase.steps} steps, {labelled} labelled + {unlabelled} unlabelled "
        f"images a micro-batch): {total:.2f} GB per rank = state {sum(state.values()) / GIGA:.2f} ({of_networks}) + "
        f"activations {activations / GIGA:.2f}"
    )


CHECK = Command(
    name="check",
    help="validate a ds_config, print its batch equation and what it costs; needs neither data nor GPU",
    examples=(
        "mpl-scale check --ds_config ds_configs/digits.json --world 2",
        "mpl-scale check --ds_config ds_configs/l2.json --world 2048",
    ),
    options=_options,
    run=_run,
)
