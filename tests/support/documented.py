"""The commands of README.md and docs/, and what `make test-docs` does with each: run it, shorten it, or say why not.

A command is a line of a ```sh block, or a command that docs/performance.md names beside a file of results. Nothing else
on the pages may look like one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/finetune.md",
    "docs/concepts.md",
    "docs/data.md",
    "docs/config.md",
    "docs/features.md",
    "docs/contributing.md",
    "docs/extending.md",
    "docs/library.md",
    "docs/planner.md",
    "docs/monitoring.md",
    "docs/experiments.md",
    "docs/experiments/feedback.md",
    "docs/performance.md",
    "docs/fidelity.md",
    "docs/slurm.md",
    "docs/faults.md",
    "docs/troubleshooting.md",
)
"""In the order of a reader."""

LISTED = {
    r"make test-gpu\b": "needs a GPU",
    r"make (test\b|test-full\b|lint\b)": "this test is one of its checks",
    r"srun ": "needs a Slurm cluster; make test-slurm runs it on a real one",
    r"sbatch |.* sbatch ": "needs a Slurm cluster; make test-slurm submits the same script to a real one",
    r"deepspeed --hostfile ": "needs a second machine",
    r"sudo apt-get install dataset-fashion-mnist": "needs root and a Debian mirror; the copy has small files instead",
    r'torchrun --nnodes "\$PET_NNODES"': "needs Kubernetes with the PyTorch operator",
    r"python -m benchmarks\.digits_table .*--add_to ": "adds to results of full length",
    r"python -m benchmarks\.preregistered --data fashion_mnist ": "needs Debian's package, not small files",
    r".* wandb\.enabled=true": "needs the package wandb and an account",
    r"tensorboard --logdir ": "serves its page until it is stopped",
    r"python -m benchmarks\.step_cpu --peer ": "needs another implementation, peer.py",
}
"""Commands that are not run, and why; the pattern matches from the start."""

SHORTENED = {
    r"make quickstart": " OPTIONS='--max_steps 2'",
    r"make bench-gpu": " TINY=1",
    r".*\btrain\.py (?!.*--max_steps)": " --max_steps 2",
    r".*benchmarks/methods\.py ": " --seeds 0 --max_steps 2",
    r"python -m benchmarks\.two_moons ": " --seeds 2 --tables literal",
    r"python -m benchmarks\.feedback ": " --seeds 2 --settings 'few labels' --rules none cosine",
    r"python -m benchmarks\.preregistered ": " --tasks 'class mismatch' --seeds 2 --trials 1",
    r"python -m benchmarks\.through_optimizer ": " --seeds 0",
    r"python -m benchmarks\.digits_table ": " --seeds 0 1 --steps 2 --methods supervised uda",
    r"python -m benchmarks\.throughput ": " --warmup 1 --rounds 1 --steps 1 --phase_steps 1",
    r".*benchmarks\.spatial ": " --model digits_cnn --batch 4 --rounds 1 --steps 1",
    r"python -m benchmarks\.augment ": " --rounds 1 --sizes 32 --batches 2",
    r"python -m benchmarks\.data ": " --rounds 1 --sizes 32 --batch 4 --stall_steps 1 --host_images 200 --host_steps 1",
    r"python -m benchmarks\.index_scale ": " --samples 20000 --steps 5",
    r"python -m benchmarks\.index_build ": " --rows 2000 --workers 1",
    r".*benchmarks\.large_split ": " --model tf_efficientnet_b0 --size 64",
    r"slurm/submit\.sh ": None,
    r"mpl-scale select .*--per_class": " --per_class 20",
    r"mpl-scale sweep (?!.*--(prepare|summary|index))": " --index 0",
    r"mpl-scale select .*--threshold": " --threshold 0 --class_size 20",
}
"""What is appended: the same command, over less. None: `--dry-run` goes first."""

PREPARED = (
    "mpl-scale index validation --source folder --output val.index",
    "mpl-scale index my_images --source folder --output jft.index",
    "python train.py --ds_config my.json --output runs/supervised --max_steps 2",
    "cp -r runs/supervised runs/teacher",
)
"""Before pages with an `mpl-scale select`: what it starts from, of small sets of images."""

STANDS_FOR = {"/data/imagenet": "data/imagenet", "/usr/share/datasets/fashion-mnist": "data/fashion-mnist"}
"""Paths of the pages and of ds_configs, and where the copy has something small for them."""


@dataclass(frozen=True)
class Command:
    """A command as its page shows it, on one line; shell comments are left out."""

    page: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((why for pattern, why in LISTED.items() if re.match(pattern, self.text)), None)

    @property
    def as_run(self) -> str:
        """The command that is run for it."""
        text = stand_in(self.text)
        for pattern, added in SHORTENED.items():
            if re.match(pattern, self.text):
                return text + added if added is not None else re.sub(r"^(\S+)", r"\1 --dry-run", text)
        return text


def stand_in(text: str) -> str:
    """The text with the copy's own paths."""
    for shown, ours in STANDS_FOR.items():
        text = text.replace(shown, ours)
    return text


def commands(page: str) -> list[Command]:
    """Of a page, in its order."""
    text = (ROOT / page).read_text()
    found = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in _joined(block)]
    if page == "docs/performance.md":
        found += re.findall(r"^- `\S+`: `(.*)`$", text, re.MULTILINE)
    return [Command(page, line) for line in found]


def files(page: str) -> dict[str, str]:
    """Of a page: what it says to save, by name; the block after a line that ends with `NAME.py`: or `NAME.json`:."""
    return dict(re.findall(r"`(\w+\.(?:py|json))`:\n\n```\w+\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))


def _joined(block: str) -> list[str]:
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [line for line in (re.sub(r"\s+# .*|^#.*", "", line).strip() for line in lines) if line]


PROGRAMS = r"(?:mpl-scale|python|deepspeed|torchrun|make|sbatch|srun|slurm/\S+|\w+=\S+)"


def strays(page: str) -> list[str]:
    """Lines of indented or unmarked blocks that look like commands: they belong into a ```sh block."""
    text = (ROOT / page).read_text()
    rest = re.sub(r"```(?:sh|python|json)\n.*?```", "", text, flags=re.DOTALL)
    blocks = "\n".join(re.findall(r"```\n(.*?)```", rest, re.DOTALL))
    indented = "\n".join(re.findall(r"^    (.*)$", rest, re.MULTILINE))
    return [line for line in f"{blocks}\n{indented}".splitlines() if re.match(rf"{PROGRAMS} (?!error)", line)]
