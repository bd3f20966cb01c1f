"""`mpl-scale sweep`: random search over settings, then the best of them on several seeds."""

from __future__ import annotations

import argparse
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_scale.cli.command import Command, positive, whole
from mpl_scale.files import refuse_output, refuse_run

if TYPE_CHECKING:
    from mpl_scale.sweep import Sweep, Task

ALL = "all"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", type=Path, metavar="SPEC", help="the JSON that declares it: docs/experiments.md")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets a folder for each trial")
    parser.add_argument("--trials", type=positive, metavar="N", help="how many are drawn; default: the spec's, or 128")
    parser.add_argument("--seed", type=_index, metavar="N", help="of the draws; default: the spec's, or 0")
    parser.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help="of the final runs: 1 to N; default: the spec's",
    )
    parser.add_argument(
        "--index", type=_index_or_all, default=ALL, metavar="I|all", help="run this trial only, failed or not"
    )
    parser.add_argument("--finals", action="store_true", help="the final runs instead of the trials")
    parser.add_argument("--processes", type=positive, default=1, metavar="P", help="runs at a time; default: 1")
    parser.add_argument(
        "--ranks", type=positive, default=1, metavar="R", help="of each run, on this machine; default: 1"
    )
    parser.add_argument("--retry", action="store_true", help="run failed ones again")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prepare", action="store_true", help="check and write every configuration, and run nothing")
    what.add_argument("--summary", action="store_true", help="run nothing; print what there is, and write best.json")


def _index(text: str) -> int:
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _index_or_all(text: str) -> int | str:
    return ALL if text == ALL else _index(text)


def _run(options: argparse.Namespace) -> int:
    refuse_output(options.output, folder=True)
    refuse_run(options.output)
    from mpl_scale.sweep import Sweep, read_spec

    spec = read_spec(options.spec, trials=options.trials, seed=options.seed, seeds=options.seeds)
    sweep = Sweep(spec, options.output)
    if options.summary:
        if not options.output.is_dir():
            raise ValueError(f"--output {options.output}: no such folder; run the sweep first")
        return _summarise(sweep)
    if options.finals and not sweep.spec.seeds:
        raise ValueError(f"{options.spec}: no seeds, and so no final runs; add seeds, or give --seeds")
    tasks = _chosen(sweep.finals() if options.finals else sweep.trials, options.index)
    _prepare(sweep, sweep.finals() if options.finals else sweep.trials, options.ranks)
    if options.prepare:
        what = "--finals" if options.finals else "--sweep"
        print(f"{len(tasks)} configurations in {options.output}; as Slurm's array:")
        print(f"sbatch --array 0-{len(tasks) - 1} slurm/sweep.sbatch {what} {shlex.quote(str(options.output))}")
        return 0
    return _train(sweep, tasks, options)


def _chosen(tasks: list[Task], index: int | str) -> list[Task]:
    if isinstance(index, str):
        return tasks
    if index >= len(tasks):
        raise ValueError(f"--index {index}: there are {len(tasks)}; give 0 to {len(tasks) - 1}")
    return [tasks[index]]


def _prepare(sweep: Sweep, tasks: list[Task], ranks: int) -> None:
    """Check all before anything is written, and write all before anything runs."""
    from mpl_scale.sweep.check import check_tasks  # torch, DALI: seconds, once the spec is known to be good
    from mpl_scale.sweep.run import visible_devices

    check_tasks(sweep.spec, tasks, ranks=ranks, cuda=bool(visible_devices()))
    sweep.prepare(tasks)


def _train(sweep: Sweep, tasks: list[Task], options: argparse.Namespace) -> int:
    from mpl_scale.sweep import State
    from mpl_scale.sweep.run import Runner, visible_devices
    from mpl_scale.trainer.lock import lock_output

    def left(tasks: list[Task]) -> list[Task]:
        skipped = {State.DONE} if options.retry or options.index != ALL else {State.DONE, State.FAILED}
        return [task for task in tasks if task.state() not in skipped]

    runner = Runner(
        processes=options.processes,
        ranks=options.ranks,
        devices=visible_devices(),
        report=lambda line: print(line, flush=True),
    )
    with ExitStack() as held:
        held.callback(runner.close)
        if options.index == ALL:  # two that walk through the same trials would wait for each other's
            held.enter_context(lock_output(sweep.folder, patience=0, note=print))
        ended = runner.run(left(tasks))
        unfinished = any(task.state() not in (State.DONE, State.FAILED) for task in tasks)
        if ended and not unfinished and options.index == ALL and not options.finals and sweep.ranked():
            finals = sweep.finals()
            if finals:
                _prepare(sweep, finals, options.ranks)
                runner.run(left(finals))
    if options.index != ALL:
        return 0 if tasks[0].state() is not State.FAILED else 1
    return _summarise(sweep)


def _summarise(sweep: Sweep) -> int:
    from mpl_scale.sweep.table import summary_lines

    for line in summary_lines(sweep):
        print(line)
    best = sweep.write_best()
    if best is not None:
        print(f"\nthe best trial's configuration: {best}")
    return 0 if best is not None else 1


SWEEP = Command(
    name="sweep",
    help="random search over settings, then the best of them on several seeds; resumable, or as a Slurm array",
    examples=(
        "mpl-scale sweep sweep.json --output runs/sweep --trials 128 --processes 2",
        "mpl-scale sweep sweep.json --output runs/sweep --seeds 10",
        "mpl-scale sweep sweep.json --output runs/sweep --summary",
        "mpl-scale sweep sweep.json --output runs/sweep --index 7",
        "mpl-scale sweep sweep.json --output runs/sweep --prepare && "
        "sbatch --array 0-127 slurm/sweep.sbatch --sweep runs/sweep",
    ),
    options=_options,
    run=_run,
)
