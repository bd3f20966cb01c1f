"""Choose the unlabelled set (sections 3.3 and 4, appendix E): score an index, apply a rule, write a new index.

The ranks share the scoring (inference/scoring.py); rank 0 then reads all scores, applies the rule (rules.py) and
publishes OUTPUT by one rename. Scores lie in OUTPUT.partial: another rule over the same ones costs no scoring.
"""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpl_scale.config import Config, RunConfig
from mpl_scale.config.names import require_known
from mpl_scale.data.decode.views import evaluation_view
from mpl_scale.files import expanded, read_object, refuse_inside
from mpl_scale.inference.scores import ScoreFiles
from mpl_scale.inference.scoring import Scoring, StoredNetwork, joined_ranks
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import Progress, config_hash
from mpl_scale.select.hashes import HashedImages, read_hashes
from mpl_scale.select.rules import SELECTION_RULES, RuleSettings
from mpl_scale.select.write import SELECTION_NAME, Wanted, write_selected
from mpl_scale.trainer.bad_input import value_on_main


@dataclass(frozen=True)
class SelectOptions:
    """The command line beside the config.

    checkpoint: a step_... folder. network: None: the teacher, or
    the student where there is none. root: where the index's shards are; None: as it says. rule: of SELECTION_RULES.
    removed: a file of SHA-256, one a line. top: classes kept of each image; None: 10, or all with `distributions`.
    chunk: images of a score file. keep_scores: leave OUTPUT.partial. overwrite: replace another index.
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
    overwrite: bool = False


def select(run: RunConfig, options: SelectOptions) -> dict[str, Any]:
    """Score, select and write, on the ranks the launcher started. Returns what selection.json holds, on every rank.

    Raises:
        ValueError: bad input; what was scored until then is kept.
    """
    config = run.mpl
    evaluation_view(config.data.evaluation, config.model.image_size)
    require_known("rule", options.rule, SELECTION_RULES)
    output = expanded(options.output).absolute()
    if output.exists() and not (output / "meta.json").is_file():
        raise ValueError(f"--output '{output}' is there and is no index; choose another folder, or remove it")
    if output == expanded(options.index).absolute():
        raise ValueError(f"--output '{output}' is --index itself; choose another folder")
    removed = read_hashes(options.removed) if options.removed is not None else frozenset()
    images = HashedImages(expanded(options.index), root=options.root)
    refuse_inside(output, images.root)
    with joined_ranks(config) as joined, ExitStack() as held:
        mesh, _ = joined
        selection = _Selection(config, dataclasses.replace(options, output=output), images, joined)
        value_on_main(mesh, lambda: selection.refuse_other(removed))
        selection.scoring.fill(held, max_bad_fraction=config.data.max_bad_fraction)
        summary = value_on_main(mesh, lambda: selection.write(removed))
        if mesh.is_main and not options.keep_scores:
            shutil.rmtree(selection.partial)
        return summary


class _Selection:
    """The scores of an index in OUTPUT.partial, and the index that is made of them."""

    def __init__(
        self, config: Config, options: SelectOptions, images: HashedImages, joined: tuple[Mesh, Progress]
    ) -> None:
        self._config, self._options, self._images = config, options, images
        self.partial = options.output.with_name(f"{options.output.name}.partial")
        classes = config.model.num_classes
        top = min(options.top or (classes if options.distributions else 10), classes)
        self._files = ScoreFiles(self.partial, len(images), options.chunk, top, (images.column,))
        network, identity = StoredNetwork(options.checkpoint, options.network), {"index": images.fingerprint}
        self.scoring = Scoring(config, images, self._files, network, joined, identity=identity)

    def _settings(self) -> RuleSettings:
        options = self._options
        return RuleSettings(
            classes=self._config.model.num_classes,
            count=options.count,
            least=options.least,
            duplicate=options.duplicate,
            argmax_only=options.argmax_only,
            seed=self._config.seed,
        )

    def _request(self, removed: frozenset[bytes]) -> str:
        """A hash of all that decides what is written."""
        rule = {"rule": self._options.rule, **dataclasses.asdict(self._settings())}
        others = {"distributions": self._options.distributions, "removed": sorted(digest.hex() for digest in removed)}
        return config_hash({"scores": self.scoring.identity, **rule, **others})

    def refuse_other(self, removed: frozenset[bytes]) -> None:
        """On rank 0: ValueError where OUTPUT is an index that this selection would replace by another one."""
        output = self._options.output
        if self._options.overwrite or not output.exists():
            return
        account = output / SELECTION_NAME
        found = read_object(account, fix="give --overwrite, or choose another --output") if account.exists() else {}
        if found.get("request") != self._request(removed):
            raise ValueError(
                f"--output '{output}' holds another index; give --overwrite to replace it, or choose another folder"
            )

    def write(self, removed: frozenset[bytes]) -> dict[str, Any]:
        """On rank 0: apply the rule and publish the index; what selection.json holds."""
        options = self._options
        folders = {"checkpoint_folder": str(options.checkpoint), "index_folder": str(self._images.folder)}
        return write_selected(
            self._files,
            self._images,
            wanted=Wanted(options.rule, self._settings(), removed, options.distributions),
            config=self._config,
            output=options.output,
            about={**self.scoring.identity, **folders, "request": self._request(removed)},
        )
