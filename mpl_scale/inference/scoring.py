"""Score an image set on all ranks, in a folder that a stopped run takes up again.

The ranks share the chunks (scores.py). The folder holds the chunks' files, plan.json with what they are scores of, and
a list of the images that could not be decoded from each rank.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from mpl_scale.config import Config
from mpl_scale.data import ImageSet, Quarantine
from mpl_scale.data.index.reader import sha256_of
from mpl_scale.files import replace_text
from mpl_scale.inference.scores import ScoreFiles, Scorer
from mpl_scale.mesh import Mesh, adopt_slurm_environment, build_mesh, choose_device, start_process_group
from mpl_scale.monitor import Progress
from mpl_scale.resolve import choose_layout, choose_numerics
from mpl_scale.trainer.bad_input import do_together, value_on_main
from mpl_scale.trainer.lock import lock_output
from mpl_scale.trainer.stored_network import load_network

PATIENCE = 7 * 86400.0
"""Seconds that ranks wait for the slowest one, and for what rank 0 makes of the scores."""


@contextmanager
def joined_ranks(config: Config) -> Iterator[tuple[Mesh, Progress]]:
    """The ranks that the launcher started, with whole images on each, and the progress that rank 0 shows."""
    adopt_slurm_environment(os.environ)
    device = choose_device(os.environ)
    choose_numerics(config, device.type)[0].apply(device)
    owns_group = not dist.is_initialized()
    if owns_group:
        start_process_group(device, timeout_seconds=PATIENCE)
    try:
        mesh = build_mesh(device=device)
        progress = Progress(config.logging.progress if mesh.is_main else "off", show=())
        if config.parallel.width > 1:
            progress.note("mpl_scale.parallel.width is ignored: each rank scores whole images")
        try:
            yield mesh, progress
        finally:
            progress.close()
    finally:
        if owns_group:
            dist.destroy_process_group()


@dataclass(frozen=True)
class StoredNetwork:
    """checkpoint: a folder step_.... name: teacher, student or ema; None: the teacher, or the student without one."""

    checkpoint: Path
    name: str | None


class Scoring:
    """The scores of an image set by a network. config: its model, data and logging sections are read."""

    def __init__(
        self,
        config: Config,
        images: ImageSet,
        files: ScoreFiles,
        network: StoredNetwork,
        joined: tuple[Mesh, Progress],
        *,
        identity: Mapping[str, Any],
    ) -> None:
        """Load the network. identity: by option, what else the scores depend on."""
        self._config, self._images, self._files = config, images, files
        self._mesh, self._progress = joined
        name, self._module = load_network(network.checkpoint, network.name, config=config, mesh=self._mesh)
        self.identity = {
            **identity,
            "checkpoint": sha256_of(network.checkpoint / "index.json"),
            "network": name,
            "config": _seen_as(config),
            "chunk": files.size,
            "top": files.top,
        }

    def fill(self, held: ExitStack, *, max_bad_fraction: float) -> None:
        """Score what the folder lacks; collective. The folder is locked until `held` is closed.

        Args:
            held: of rank 0.
            max_bad_fraction: of the images, more that cannot be decoded end the run.

        Raises:
            ValueError: the folder has the scores of something else, too many images are bad, or the network gives
                non-finite values.
        """
        missing = value_on_main(self._mesh, lambda: self._take_up(held))
        own = np.array_split(np.array(missing, np.int64), self._mesh.world)[self._mesh.rank].tolist()
        do_together(self._mesh, lambda: self._score(own, max_bad_fraction))

    def _take_up(self, held: ExitStack) -> list[int]:
        """On rank 0: lock the folder; the chunks that it lacks."""
        held.enter_context(lock_output(self._files.folder, patience=0.0, note=self._progress.note))
        _take_up(self._files.folder, self.identity)
        return self._files.missing()

    def _score(self, chunks: list[int], max_bad_fraction: float) -> None:
        """This rank's part: those chunks."""
        config, mesh, folder = self._config, self._mesh, self._files.folder
        report = _Report(self._progress, config, mesh, images=sum(len(self._files.ids(chunk)) for chunk in chunks))
        channels_last, _ = choose_layout(config.parallel, mesh.device.type)
        scorer = Scorer(self._files, self._images, self._module, config, mesh.device, channels_last)
        quarantine = Quarantine(max_fraction=max_bad_fraction, path=folder / f"quarantine-rank{mesh.rank}.jsonl")
        scorer.score(chunks, quarantine=quarantine, report=report)


def undecodable(folder: Path) -> list[str]:
    """The lines of all ranks' lists of images, each image once."""
    lines = {}
    for path in sorted(folder.glob("quarantine-rank*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines[json.loads(line)["name"]] = line
            except (ValueError, TypeError, KeyError):  # a line that a kill cut short
                continue
    return list(lines.values())


class _Report:
    """Shows how far this rank has come, in batches; the others are about as far."""

    def __init__(self, progress: Progress, config: Config, mesh: Mesh, *, images: int) -> None:
        self._progress, self._every, self._shown = progress, config.logging.every, 0
        self._batch = config.data.evaluation_batch
        steps = -(-images // self._batch)
        progress.start("score", total=steps, done=0, images_per_step=self._batch * mesh.world)

    def __call__(self, done: int) -> None:
        step = done // self._batch
        if step >= self._shown + self._every:
            self._progress.report({}, step=step)
            self._shown = step


def _seen_as(config: Config) -> str:
    """Hash of what, of the config, the scores depend on."""
    data = config.data
    seen = {
        "model": config.model.model_dump(mode="json"),
        "evaluation": data.evaluation.model_dump(mode="json"),
        "mean": data.mean,
        "std": data.std,
        "max_pixels": data.max_pixels,
        "batch": data.evaluation_batch,
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def _take_up(partial: Path, identity: dict[str, Any]) -> None:
    """Refuse the scores of a stopped run that are not of this network, config and set."""
    plan = partial / "plan.json"
    if not plan.exists():
        replace_text(plan, json.dumps(identity, indent=1) + "\n")
        return
    try:
        before = json.loads(plan.read_text(encoding="utf-8"))
    except ValueError:
        before = {}
    other = [f"--{name}" if name != "config" else "config" for name in identity if before.get(name) != identity[name]]
    if other:
        raise ValueError(
            f"'{partial}' holds scores of another {', '.join(other)}; choose another --output, or remove that folder"
        )
