"""Top-1, top-5 and loss of whole weights on the test split.

Evaluation runs on modules of its own, never on the trained ones: what a CUDA graph captured stays untouched, and
ZeRO-3's partitioned weights need no special case. Where training splits images by width, so does evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.config import Config
from mpl_scale.data import ImageFormat, Quarantine, Splits, evaluation_batches
from mpl_scale.data.evaluation import EvaluationBatch
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.mesh import Mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import METHODS
from mpl_scale.mpl.losses import cross_entropy
from mpl_scale.spatial import input_columns
from mpl_scale.trainer.phases import Weights, split

Results = dict[str, float]


class Evaluator:
    """Evaluates networks by name ("teacher"; anything else has the student's architecture)."""

    def __init__(
        self,
        config: Config,
        *,
        splits: Splits,
        mesh: Mesh,
        quarantine: Quarantine | None = None,
        resident: ResidentParts | None = None,
    ) -> None:
        self._config, self._splits, self._mesh = config, splits, mesh
        self._quarantine, self._resident = quarantine, resident
        self._modules: dict[str, nn.Module] = {}

    def evaluate(self, weights: Mapping[str, Weights]) -> dict[str, Results]:
        """Results by network: top1 and top5 in percent, loss (mean CE), images.

        Every readable test image counts once, however they are spread over ranks. Collective over the world. A teacher
        that sees no images is left out.
        """
        if not METHODS[self._config.method.name].teacher_sees_images:
            weights = {name: values for name, values in weights.items() if name != "teacher"}
        modules = {name: self._loaded(name, values) for name, values in weights.items()}
        size = self._config.model.image_size
        batches = evaluation_batches(
            self._config.data,
            self._splits,
            images=ImageFormat(image_size=size, columns=input_columns(size, self._mesh.width)),
            mesh=self._mesh,
            quarantine=self._quarantine,
            resident=None if self._resident is None else self._resident.test,
        )
        sums = count_right(modules, batches, device=self._mesh.device)
        return {name: self._reduced(total) for name, total in sums.items()}

    def _loaded(self, name: str, weights: Weights) -> nn.Module:
        if name not in self._modules:
            kind = "teacher" if name == "teacher" else "student"
            section = getattr(self._config.model, kind)
            group = self._mesh.world_group  # the split asks for it; evaluation takes no statistics
            module = build_model(section, self._config.model, field=f"mpl_scale.model.{kind}", seed=0, group=group)
            module = split(module, self._config, mesh=self._mesh)
            self._modules[name] = module.to(self._mesh.device).eval()
        module = self._modules[name]
        module.load_state_dict(weights)
        return module

    def _reduced(self, total: torch.Tensor) -> Results:
        if self._mesh.world_group is not None:
            dist.all_reduce(total, group=self._mesh.world_group)
        top1, top5, loss, images = (total / self._mesh.width).tolist()
        return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": images}


@torch.no_grad()
def count_right(
    modules: Mapping[str, nn.Module], batches: Iterable[EvaluationBatch], *, device: torch.device
) -> dict[str, torch.Tensor]:
    """[rows right at 1, right at 5, summed CE, rows] by network, of this rank; float64 [4], on the device."""
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in modules}
    for images, labels, valid in batches:
        for name, module in modules.items():
            sums[name] += _sums(module(images), labels, valid)
    return sums


def _sums(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sums over the valid rows, float64 [4]: top-1 and top-5 correct, cross-entropy, count."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    rows = torch.stack([top[:, 0], top.any(1), cross_entropy(logits, labels), torch.ones_like(labels)])
    return (rows.double() * valid).sum(1)
