"""Every command of README.md and docs/ runs in a fresh copy, or is listed with the reason; extending.md's parts work.

The commands take minutes: `make test-docs`, with MPL_SCALE_TEST_DOCS=1. tests/support/documented.py says what becomes
of each.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from mpl_scale.config import load_config
from mpl_scale.spatial import plan_layout
from tests.support import labelled_sets
from tests.support.configs import DIGITS, tiny, write
from tests.support.documented import LISTED, PAGES, PREPARED, SHORTENED, Command, commands, files, stand_in, strays
from tests.support.mini_imagenet import write_folder, write_tfrecord

REPOSITORY = DIGITS.parents[1]
PATIENCE = 600
"""Seconds for one command."""
PAGES_AT_ONCE = 2
LAUNCHING = threading.Lock()
"""Launchers meet at the same port."""
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
MODULE = "my_parts"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / f"{MODULE}.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    for name in ("ds_configs", "train.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_of_extensions_runs(parts: Path) -> None:
    (command,) = re.findall(r"```sh\npython (.*?)\n```", PAGE)
    path = os.pathsep.join([str(parts), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *shlex.split(command)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (parts / "runs/my_parts/metrics.jsonl").read_text().splitlines()]
    assert {row["feedback"] for row in rows if "feedback" in row} <= {-1.0, 0.0, 1.0}  # the rule's signs
    assert json.loads((parts / "runs/my_parts/config.json").read_text())["mpl_scale"]["imports"] == [MODULE]
    layer = importlib.import_module(MODULE).Scale(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert "0" in plan_layout(model, image_size=8, width=2, switch_at="never").sites
    assert torch.equal(layer(torch.ones(1, 4, 2, 2)), torch.ones(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("no_such_module", None, r"mpl_scale\.imports = 'no_such_module': ModuleNotFoundError: .*PYTHONPATH"),
        (
            "broken_module",
            "1 / 0",
            r"mpl_scale\.imports = 'broken_module': ZeroDivisionError: division by zero; it must",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str | None, message: str
) -> None:
    if source is not None:
        (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    raw = tiny()
    raw["mpl_scale"]["imports"] = [module]
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path, raw))
    assert "\n" not in str(caught.value)
    assert module not in sys.modules


def test_every_page_and_every_command_is_known() -> None:
    """No page is left out, no command hides outside its block, no row of the tables is without a command."""
    there = {"README.md", *(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))}
    assert there == set(PAGES)
    assert {page: strays(page) for page in PAGES if strays(page)} == {}
    texts = [command.text for page in PAGES for command in commands(page)]
    for pattern in (*LISTED, *SHORTENED):
        assert any(re.match(pattern, text) for text in texts), f"no page has a command like {pattern}"
    for command in (command for page in PAGES for command in commands(page) if command.reason is None):
        assert re.match(r"(export|source|make|mpl-scale|python|deepspeed|torchrun|slurm/submit\.sh) ", command.text), (
            command
        )


def test_files_that_a_page_says_to_save_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    saved = {name: content for page in PAGES for name, content in files(page).items()}
    for name, content in saved.items():
        (tmp_path / name).write_text(content)
        if name.endswith(".json"):
            load_config(tmp_path / name)
        else:
            compile(content, name, "exec")
    assert {"stand_ins.py", "finetune.json", "compare.py"} <= saved.keys()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = (REPOSITORY / page).read_text()
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            path = (REPOSITORY / page).parent / target if target else REPOSITORY / page
            assert path.exists(), f"{page}: {target}"
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in slugs, f"{page}: {target}#{anchor}"


def test_the_walks_name_files_and_functions_that_exist() -> None:
    page = (REPOSITORY / "docs" / "concepts.md").read_text()
    for title in ("batch", "config value"):
        walk = page.partition(f"## The walk of a {title}\n")[2].partition("\n## ")[0]
        rows = [line for line in walk.splitlines() if line.startswith("|")][2:]
        assert len(rows) == 10
        for row in rows:
            named = re.findall(r"\[`([^`]+)`\]\(\.\./mpl_scale/([^)]+)\)((?:,? `[^`]+`)+)", row)
            assert named, row
            for shown, path, functions in named:
                assert shown == path
                tree = ast.parse((REPOSITORY / "mpl_scale" / path).read_text())
                for function in re.findall("`([^`]+)`", functions):
                    assert function in definitions(tree), f"{path}: {function}"


def definitions(tree: ast.Module) -> set[str]:
    """Names of a file's functions and classes, and of its methods as Class.method."""
    found, kinds = set(), (ast.FunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def fresh_copy(folder: Path) -> dict[str, str]:
    """A clone of the checkout with this Python's packages as its .venv; the environment of a shell in it.

    What is not committed yet is laid over it. The pages' stand-ins for large data are small.
    """
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    listed = ["git", "ls-files", "-z", "--modified", "--deleted", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
        elif name:
            (folder / name).unlink(missing_ok=True)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for path in (*Path(sys.prefix).iterdir(), *(Path(sys.prefix) / "bin").iterdir()):
        link = programs.parent / path.relative_to(sys.prefix)
        if path.name not in ("bin", "mpl-scale", ".installed"):
            link.symlink_to(path)
    script = "import sys\nfrom mpl_scale.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    (programs / "mpl-scale").write_text(f"#!{programs}/python\n{script}")
    (programs / "mpl-scale").chmod(0o755)
    (programs / ".installed").touch()
    write_tfrecord(folder / "data" / "imagenet")
    labelled_sets.write(folder / "data" / "fashion-mnist", "idx", [*range(10)] * 100, test=[*range(10)])
    fashion = folder / "ds_configs" / "fashion_mnist.json"
    fashion.write_text(stand_in(fashion.read_text()))
    for copy in range(8):  # of six classes: enough for a batch
        write_folder(folder / "written", "PNG" if copy else "JPEG")
        for path in (folder / "written").glob("*/*.*"):
            images = folder / ("my_images" if copy else "validation") / path.parent.name
            images.mkdir(parents=True, exist_ok=True)
            path.rename(images / f"{copy}_{path.name}")
    raw = json.loads((folder / "ds_configs" / "digits.json").read_text())
    raw["mpl_scale"]["data"] |= {"source": "folder", "root": "my_images"}
    raw["mpl_scale"]["model"] |= {"num_classes": 6, "image_size": 32}
    write(folder, raw, "my.json")
    (folder / f"{MODULE}.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MPL_SCALE"))}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(folder), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("MPL_SCALE_TEST_DOCS"), reason="minutes: make test-docs")
def test_a_strangers_path(tmp_path: Path) -> None:
    """Each page's commands in its order, in a copy of its own, over less (documented.SHORTENED); two pages at a time.

    MPL_SCALE_TEST_DOCS=docs/planner.md runs that page alone.
    """
    wanted = os.environ["MPL_SCALE_TEST_DOCS"]
    pages = [wanted] if wanted in PAGES else PAGES
    with ThreadPoolExecutor(PAGES_AT_ONCE) as pool:
        runs = [pool.submit(run_page, page, tmp_path / Path(page).stem / "mpl_scale") for page in pages]
        failed = [failure for run in runs for failure in run.result()]
    assert not failed, "\n\n".join(failed)


def run_page(page: str, folder: Path) -> list[str]:
    """What each command that failed said last."""
    environment = fresh_copy(folder)
    for name, content in files(page).items():
        (folder / name).write_text(content)
    exports: list[str] = []
    failed = []
    shown = commands(page)
    selects = any("mpl-scale select" in command.text for command in shown)
    for command in (*(Command(page, text) for text in PREPARED if selects), *shown):
        if command.reason is not None:
            print(f"{command.page}: not run ({command.reason}): {command.text}", flush=True)
            continue
        if command.text.startswith(("export ", "source ")):
            exports.append(command.text)
        line = "\n".join([*exports, command.as_run])
        bash = ["bash", "-e", "-c", line]
        with LAUNCHING if re.search(r"\b(deepspeed|torchrun|make quickstart) ", line) else nullcontext():
            began = time.monotonic()
            done = subprocess.run(bash, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
            seconds = time.monotonic() - began
        print(f"{command.page}: {seconds:.0f} s, status {done.returncode}: {command.as_run}", flush=True)
        if done.returncode:
            failed.append(f"{command.page}: {command.as_run}\n{(done.stdout + done.stderr)[-2000:]}")
    return failed
