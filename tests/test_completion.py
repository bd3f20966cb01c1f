"""Tab completion, asked of a real bash as its readline asks, and that zsh and fish get all there is to complete."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mpl_scale.cli.completion import fields, script
from mpl_scale.cli.main import COMMANDS, make_parser
from mpl_scale.config import load_config
from tests.support.configs import DIGITS

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
compopt() {{ echo "compopt $*"; }}
$(complete -p mpl-scale | sed -E 's/.*-F ([^ ]+).*/\\1/') mpl-scale
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("completion")
    (made / "script").write_text(script(make_parser(), "bash"))
    (made / "my_config.json").touch()
    (made / "my_run").mkdir()
    return made


def completed(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word, and what it is told of it."""
    quoted = " ".join(f"'{word}'" for word in ("mpl-scale", *words))
    asked = ASK.format(script=folder / "script", words=quoted)
    bash = ["bash", "--norc", "-u", "-c", asked]
    done = subprocess.run(bash, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    return done.stdout.split("\n")[:-1]


def test_bash_completes_commands_options_and_their_values(folder: Path) -> None:
    assert completed(folder, "ch") == ["check"]
    assert set(completed(folder, "")) >= {command.name for command in COMMANDS}
    assert completed(folder, "check", "--wor") == ["--world"]
    assert completed(folder, "split", "--verif") == completed(folder, "partition", "--verif") == ["--verify"]
    assert completed(folder, "plan", "--gpus", "8", "--sw") == ["--sweep"]
    assert completed(folder, "export", "run", "--network", "te") == ["teacher"]


def test_bash_completes_files_and_folders(folder: Path) -> None:
    assert "my_config.json" in completed(folder, "train", "--ds_config", "my")
    assert "my_run" in completed(folder, "train", "--output", "my")
    assert "my_config.json" not in completed(folder, "train", "--output", "my")


def test_bash_completes_the_fields_of_set_and_leaves_no_space_behind(folder: Path) -> None:
    offered = completed(folder, "train", "--set", "mpl_scale.optim.student.lr")
    assert offered == ["compopt -o nospace", "mpl_scale.optim.student.lr="]
    after = ("train", "--ds_config", "a.json", "--set", "mpl_scale.seed", "=", "3", "--set", "zero_optimization.s")
    assert completed(folder, *after)[-1] == "zero_optimization.stage="


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_every_command_and_field(shell: str, tmp_path: Path) -> None:
    text = script(make_parser(), shell)
    for word in (*(command.name for command in COMMANDS), *(f"{path}=" for path in fields())):
        assert word in text, word
    program = shutil.which(shell)
    if program is not None:  # its own parser
        (tmp_path / "script").write_text(text)
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True, timeout=60)


def test_every_offered_field_can_be_set() -> None:
    """The loader knows each path that is offered: DIGITS' own value, set again, changes nothing."""
    resolved = load_config(DIGITS).resolved()
    for path in fields():
        value: object = resolved
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and path.startswith("mpl_scale."):
            assert load_config(DIGITS, overrides=[f"{path}={json.dumps(value)}"]).resolved() == resolved, path
