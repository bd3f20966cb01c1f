"""Choose the unlabelled set (sections 3.3 and 4, appendix E): score an index, apply a rule, write a new index.

The ranks share the chunks (scoring.py); rank 0 then reads all scores, applies the rule (data/selection.py) and
publishes OUTPUT by one rename. Scores lie in OUTPUT.partial: another rule over the same ones costs no scoring.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from mpl_scale.config import Config, RunConfig
from mpl_scale.config.names import require_known
from mpl_scale.data import Quarantine
from mpl_scale.data.decode.views import evaluation_view
from mpl_scale.data.index.reader import sha256_of
from mpl_scale.files import replace_text
from mpl_scale.mesh import Mesh, adopt_slurm_environment, build_mesh, choose_device, start_process_group
from mpl_scale.monitor import Progress
from mpl_scale.resolve import choose_layout, choose_numerics
from mpl_scale.select.hashes import read_hashes
from mpl_scale.select.rules import SELECTION_RULES, RuleSettings
from mpl_scale.select.scores import HashedImages, ScoreFiles, Scorer
from mpl_scale.select.write import Wanted, write_selected
from mpl_scale.trainer.bad_input import do_together, value_on_main
from mpl_scale.trainer.lock import lock_output
from mpl_scale.trainer.stored_network import load_network

PATIENCE = 7 * 86400.0
"""Seconds that ranks wait for the slowest one, and for the selection."""


@dataclass(frozen=True)
class SelectOptions:
    """The command line beside the config.

    checkpoint: a step_... folder. network: None: the teacher, or
    the student where there is none. root: where the index's shards are; None: as it says. rule: of SELECTION_RULES.
    removed: a file of SHA-256, one a line. top: classes kept of each image; None: 10, or all with `distributions`.
    chunk: images of a score file. keep_scores: leave OUTPUT.partial.
    """

    checkpoint: Path
    index: Path
    output: Path
    rule: str
    count: int
    least: float = 0.0
    duplicate: bool = False
    argmax_only: bool = False
    network: str | None = None
    root: Path | None = None
    removed: Path | None = None
    distributions: bool = False
    top: int | None = None
    chunk: int = 65536
    keep_scores: bool = False


def select(run: RunConfig, options: SelectOptions) -> dict[str, Any]:
    """Score, select and write, on the ranks the launcher started. Returns what selection.json holds, on every rank.

    Raises:
        ValueError: bad input; what was scored until then is kept.
    """
    adopt_slurm_environment(os.environ)
    device, config = choose_device(os.environ), run.mpl
    choose_numerics(config, device.type)[0].apply(device)
    evaluation_view(config.data.evaluation, config.model.image_size)
    require_known("rule", options.rule, SELECTION_RULES)
    output = options.output.expanduser().absolute()
    if output.exists() and not (output / "meta.json").is_file():
        raise ValueError(f"--output '{output}' is there and is no index; choose another folder, or remove it")
    if output == options.index.expanduser().absolute():
        raise ValueError(f"--output '{output}' is --index itself; choose another folder")
    removed = read_hashes(options.removed) if options.removed is not None else frozenset()
    images = HashedImages(options.index.expanduser(), root=options.root)
    owns_group = not dist.is_initialized()
    if owns_group:
        start_process_group(device, timeout_seconds=PATIENCE)
    try:
        mesh = build_mesh(device=device)
        return _select(config, dataclasses.replace(options, output=output), images, removed, mesh)
    finally:
        if owns_group:
            dist.destroy_process_group()


def _select(
    config: Config, options: SelectOptions, images: HashedImages, removed: frozenset[bytes], mesh: Mesh
) -> dict[str, Any]:
    progress = Progress(config.logging.progress if mesh.is_main else "off", show=())
    if config.parallel.width > 1:
        progress.note("mpl_scale.parallel.width is ignored: each rank scores whole images")
    with ExitStack() as held:
        held.callback(progress.close)
        selection = _Selection(config, options, images, mesh, progress)
        missing = value_on_main(mesh, lambda: selection.take_up(held))
        own = np.array_split(np.array(missing, np.int64), mesh.world)[mesh.rank].tolist()
        do_together(mesh, lambda: selection.score(own))
        summary = value_on_main(mesh, lambda: selection.write(removed))
        if mesh.is_main and not options.keep_scores:
            shutil.rmtree(selection.partial)
        return summary


class _Selection:
    """The scores of an index in OUTPUT.partial, and the index that is made of them."""

    def __init__(
        self, config: Config, options: SelectOptions, images: HashedImages, mesh: Mesh, progress: Progress
    ) -> None:
        self._config, self._options, self._images, self._mesh = config, options, images, mesh
        self._progress = progress
        self.partial = options.output.with_name(f"{options.output.name}.partial")
        classes = config.model.num_classes
        top = min(options.top or (classes if options.distributions else 10), classes)
        self._files = ScoreFiles(self.partial, len(images), options.chunk, top)
        self._network, self._module = load_network(options.checkpoint, options.network, config=config, mesh=mesh)

    def take_up(self, held: ExitStack) -> list[int]:
        """On rank 0: lock the folder of the scores until `held` is closed; the chunks that it lacks.

        Raises ValueError where it has the scores of another network, config or index.
        """
        held.enter_context(lock_output(self.partial, patience=0.0, note=self._progress.note))
        self._identity = {
            "index": self._images.fingerprint,
            "checkpoint": sha256_of(self._options.checkpoint / "index.json"),
            "network": self._network,
            "config": _seen_as(self._config),
            "chunk": self._options.chunk,
            "top": self._files.top,
        }
        _take_up(self.partial, self._identity)
        return self._files.missing()

    def score(self, chunks: list[int]) -> None:
        """This rank's part: those chunks."""
        config, mesh = self._config, self._mesh
        report = _Report(self._progress, config, mesh, images=sum(len(self._files.ids(chunk)) for chunk in chunks))
        path = self.partial / f"quarantine-rank{mesh.rank}.jsonl"
        channels_last, _ = choose_layout(config.parallel, mesh.device.type)
        scorer = Scorer(self._files, self._images, self._module, config, mesh.device, channels_last)
        quarantine = Quarantine(max_fraction=config.data.max_bad_fraction, path=path)
        scorer.score(chunks, quarantine=quarantine, report=report)

    def write(self, removed: frozenset[bytes]) -> dict[str, Any]:
        """On rank 0: apply the rule and publish the index; what selection.json holds."""
        options = self._options
        settings = RuleSettings(
            classes=self._config.model.num_classes,
            count=options.count,
            least=options.least,
            duplicate=options.duplicate,
            argmax_only=options.argmax_only,
            seed=self._config.seed,
        )
        folders = {"checkpoint_folder": str(options.checkpoint), "index_folder": str(self._images.folder)}
        return write_selected(
            self._files,
            self._images,
            wanted=Wanted(options.rule, settings, removed, options.distributions),
            config=self._config,
            output=options.output,
            about={**self._identity, **folders},
        )


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
    """Refuse the scores of a stopped run that are not of this network, config and index."""
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
