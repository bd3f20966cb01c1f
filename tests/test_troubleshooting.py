"""docs/troubleshooting.md: each message on the page is one of the source's; two of them are provoked here."""

from __future__ import annotations

import ast
import functools
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

import mpl_scale
from mpl_scale.cli.main import main
from tests.support.configs import DIGITS

PAGE = DIGITS.parents[1] / "docs" / "troubleshooting.md"
OURS, TORCHS = PAGE.read_text().split("## Of torch, not of this package")
VALUE = "\0"
"""What stands for a value in a message of the source."""


def messages(text: str) -> list[str]:
    return re.findall(r"^    (\S.*)$", text, re.MULTILINE)


@functools.cache
def templates() -> list[str]:
    """Every string of the package, values left out; neighbours are one string."""
    found = []
    for path in Path(mpl_scale.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(_text(part) for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else VALUE


def pieces(message: str) -> Iterator[str]:
    """What stands between the values, in the order of the message."""
    for part in message.split("..."):
        text = part.strip(" '\"?;:,()")
        if len(text) > 3:
            yield text


def in_source(message: str) -> bool:
    """Whether all its pieces are in the source's messages, and those of the longest one's message in the same order."""
    rest = list(pieces(message))
    longest = max(rest, key=len)
    if not all(any(piece in template for template in templates()) for piece in rest):
        return False
    return any(_ordered([piece for piece in rest if piece in template], template) for template in _with(longest))


def _with(piece: str) -> list[str]:
    return [template for template in templates() if piece in template]


def _ordered(found: list[str], template: str) -> bool:
    return re.search(".*".join(map(re.escape, found)), template, re.DOTALL) is not None


@pytest.mark.parametrize("message", messages(OURS))
def test_every_message_of_the_page_is_the_sources(message: str) -> None:
    assert in_source(message), message


def test_a_message_that_nobody_writes_is_found_out() -> None:
    assert not in_source("batch equation mended: train_batch_size ... != train_micro_batch_size_per_gpu ...")


def test_a_port_in_use_is_torchs_message() -> None:
    (message,) = messages(TORCHS)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(RuntimeError) as caught:
            dist.TCPStore("127.0.0.1", taken.getsockname()[1], world_size=1, is_master=True)
    for piece in message.split(" ... "):
        assert piece in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    said = capsys.readouterr().err
    assert said == "mpl-scale: error: shtab is not installed: make install, or pip install shtab\n"
    assert main(["completion", "bash", "--debug"]) == 2  # the status is the same: a batch job is not requeued
    debugged = capsys.readouterr().err
    assert debugged.startswith("Traceback (most recent call last)")
    assert debugged.endswith(said)


def test_a_missing_library_is_one_line_of_every_command() -> None:
    """Not while the commands are imported: their help needs no torch, which takes seconds, and no DALI."""
    script = (
        "import sys; sys.modules |= {'torch': None, 'nvidia': None}; from mpl_scale.cli import main; "
        f"sys.exit(main(['check', '--ds_config', '{DIGITS}']))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (
        2,
        "mpl-scale: error: torch is not installed: make install, or pip install torch\n",
    )
