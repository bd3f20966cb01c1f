"""`mpl-scale init`: a configuration of one's own, from one that comes with the package, and a script that trains it."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from mpl_scale.cli.command import Command
from mpl_scale.cli.questions import asked
from mpl_scale.config import load_config
from mpl_scale.config.load import read_config
from mpl_scale.config.shipped import shipped_path
from mpl_scale.files import refuse_output, replace_text

SCRIPT = """#!/usr/bin/env bash
# Train {config} on the processes of one machine, RANKS of them (default: {ranks}); options as of mpl-scale train.
set -euo pipefail
cd "$(dirname "$0")"
exec torchrun --standalone --nproc_per_node "${{RANKS:-{ranks}}}" --no-python mpl-scale train --ds_config {config} "$@"
"""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", default="digits", metavar="NAME", help="see mpl-scale configs; default: digits"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME.json; the script is beside it, .sh")
    parser.add_argument("--set", action="append", default=[], metavar="A.B.C=VALUE", help="as of mpl-scale train")
    parser.add_argument("--ask", action="store_true", help="ask for data, classes, image size and GPUs")


def _run(options: argparse.Namespace) -> int:
    source = shipped_path(options.name)
    output = options.output or Path(f"{options.name}.json")
    if output.suffix != ".json":
        raise ValueError(f"--output {output}: name a .json file")
    script = output.with_suffix(".sh")
    for path in (output, script):
        refuse_output(path, folder=False)
        if path.exists():
            raise ValueError(f"--output {path} is there already; name another, or remove it")
    overrides, gpus = asked(options.name, options.set) if options.ask else (options.set, 0)
    run = load_config(source, overrides=overrides)
    replace_text(output, json.dumps(read_config(source, overrides=overrides), indent=2) + "\n")
    replace_text(script, SCRIPT.format(config=shlex.quote(output.name), ranks=gpus or 1))
    script.chmod(0o755)
    for note in run.notes:
        print(note)
    print(f"{output}: {run.mpl.paper}")
    print(f"check it: mpl-scale check --ds_config {output}")
    print(f"train it: bash {script}")
    return 0


INIT = Command(
    name="init",
    help="write a configuration of one's own, from one of mpl-scale configs, and a script that trains it",
    examples=(
        "mpl-scale init digits --output mine.json --set mpl_scale.data.labelled_per_class=10",
        "mpl-scale init l2_8gpu",
        "mpl-scale init imagenet10_resnet50 --ask",
    ),
    options=_options,
    run=_run,
)
