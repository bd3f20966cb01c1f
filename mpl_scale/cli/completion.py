"""`mpl-scale completion`: what a shell needs to complete commands, options, files and the fields of --set.

Not shtab's own option: it has no place for bash's `nospace`, and would need shtab to be installed for every command.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pydantic import BaseModel

from mpl_scale.cli.command import Command
from mpl_scale.config.schema import Config

FILES = ("ds_config", "spec", "runs", "calibration", "gpu", "plot", "remove", "write_hashes")
"""Arguments that name files, by destination."""
FOLDERS = ("output", "checkpoint", "root", "index", "resume")
TOP_LEVEL = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "zero_optimization.stage",
)
"""DeepSpeed's fields that runs differ in; it has hundreds."""

# An assignment goes on after its "=": no space behind it.
_BASH = """
_mpl_scale_completion() {
  _shtab_mpl_scale "$@"
  if [[ "${COMPREPLY[0]-}" == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _mpl_scale_completion mpl-scale
"""


def fields(section: type[BaseModel] = Config, path: str = "mpl_scale") -> Iterator[str]:
    """Dotted paths of all fields that --set takes, including the teacher's and the student's."""
    if section is Config:
        yield from TOP_LEVEL
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{path}.{name}")
        else:
            yield f"{path}.{name}"


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion of a parser, to be sourced by bash or fish, or put on zsh's fpath."""
    import shtab

    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest == "set":
                action.complete = {
                    "bash": "_mpl_scale_fields",
                    "zsh": "_mpl_scale_fields",
                    "fish": "(_mpl_scale_fields)",
                }
            elif action.dest in FILES:
                action.complete = shtab.FILE
            elif action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY
    paths = [f"{path}=" for path in fields()]
    words = " ".join(paths)
    preamble = {
        "bash": f'_mpl_scale_fields() {{ compgen -W "{words}" -- "$1"; }}',
        "zsh": f"_mpl_scale_fields() {{ compadd -S '' -- {words}; }}",
        "fish": f"function _mpl_scale_fields\n  printf '%s\\n' {words}\nend",
    }
    text: str = shtab.complete(parser, shell, preamble=preamble)  # type: ignore[arg-type]  # its docs: a dict by shell
    return text + _BASH if shell == "bash" else text


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def _run(options: argparse.Namespace) -> int:
    print(script(options.parser, options.shell))
    return 0


COMPLETION = Command(
    name="completion",
    help="print what a shell needs to complete commands, options, files and the fields of --set",
    examples=(
        "source <(mpl-scale completion bash)",
        "mpl-scale completion zsh > ~/.zfunc/_mpl-scale",
        "mpl-scale completion fish > ~/.config/fish/completions/mpl-scale.fish",
    ),
    options=_options,
    run=_run,
)
