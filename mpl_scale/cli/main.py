"""Parse the command line, hand over to a command, print errors as one line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from mpl_scale.cli.check import CHECK
from mpl_scale.cli.command import replace_missing_characters
from mpl_scale.cli.completion import COMPLETION
from mpl_scale.cli.configs import CONFIGS
from mpl_scale.cli.distributions import DISTRIBUTIONS
from mpl_scale.cli.evaluate import EVALUATE
from mpl_scale.cli.export import EXPORT
from mpl_scale.cli.index import INDEX
from mpl_scale.cli.init import INIT
from mpl_scale.cli.inspect import INSPECT
from mpl_scale.cli.partition import PARTITION
from mpl_scale.cli.plan import PLAN
from mpl_scale.cli.predict import PREDICT
from mpl_scale.cli.report import REPORT
from mpl_scale.cli.select import SELECT
from mpl_scale.cli.sweep import SWEEP
from mpl_scale.cli.train import TRAIN
from mpl_scale.packages import find_package
from mpl_scale.rendezvous import RanksMissing

COMMANDS = (
    *(CONFIGS, INIT, TRAIN, EVALUATE, PREDICT, EXPORT),
    *(PLAN, CHECK, PARTITION, INDEX, SELECT, DISTRIBUTIONS),
    *(INSPECT, REPORT, SWEEP, COMPLETION),
)
BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done or stopped with its state saved, 1 unequal, 2 bad input.

    75: ranks were missing; 130: Ctrl-C.
    """
    replace_missing_characters()
    options = make_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # for the second, while threads end
        print("\nmpl-scale: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except RanksMissing as error:
        return _refused(error, str(error), RanksMissing.status, debug=options.debug)
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.startswith("mpl_scale"):
            raise
        package = find_package(name)
        line = f"{error}; install it, --debug shows what imports it" if package is None else package.missing()
        return _refused(error, line, BAD_INPUT, debug=options.debug)
    except OSError as error:
        output = getattr(options, "output", None)
        where = f" (--output {output})" if error.filename is None and output is not None else ""
        return _refused(error, f"{error}{where}", BAD_INPUT, debug=options.debug)
    except ValueError as error:
        return _refused(error, str(error), BAD_INPUT, debug=options.debug)
    return status


def _refused(error: Exception, line: str, status: int, *, debug: bool) -> int:
    """Print an error, once if every rank has it, else with the rank's number; returns the status."""
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    alone = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) == "1"
    if rank == "0" or where or alone:
        if debug:
            traceback.print_exception(error)
        print(f"mpl-scale: error{where}: {line}", file=sys.stderr, flush=True)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands, with their examples."""

    def examples(lines: Sequence[str]) -> str:
        return "\n  ".join(["examples:", *lines])

    parser = argparse.ArgumentParser(
        prog="mpl-scale",
        description="Train teacher and student by Meta Pseudo Labels.",
        epilog=examples([line for command in COMMANDS for line in command.examples[:1]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            aliases=command.aliases,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=examples(command.examples),
            formatter_class=parser.formatter_class,
        )
        command.options(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        own.set_defaults(run=command.run)
        if command is COMPLETION:  # alone: a parser cannot be sent to another process
            own.set_defaults(parser=parser)
    return parser
