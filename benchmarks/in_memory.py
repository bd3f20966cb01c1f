"""Runs whose data fit in memory: the trainer's phases, states, methods and engines, without its loader and its files.

A run of a small network takes seconds here, which is what statistics over many seeds need. What a step sees is what
`mpl_scale.data.loader` would give it: the same order of samples (`data/plan.py`) and views by (seed, epoch, id).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mpl_scale.augment import StrongView
from mpl_scale.config import RunConfig, check
from mpl_scale.config.schema import Config
from mpl_scale.data.normalise import Normalise
from mpl_scale.data.samples.plan import Draws, SamplePlan
from mpl_scale.data.samples.streams import Purpose, stream_of
from mpl_scale.data.vectors import Jitter
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl.losses import cross_entropy
from mpl_scale.trainer.phases import Phase, Weights, build_state, collect_weights, plan_phases
from mpl_scale.types import Batch

CPU = torch.device("cpu")
Results = dict[str, float]
"""Of a run, by "student_top1" (percent), "h_mean" and the like."""


@dataclass(frozen=True)
class Samples:
    """A data set and its parts.

    inputs: float32 [N, F], or uint8 [N, 3, H, W]. labels: int64 [N], what training sees. truth: int64 [N], what
    evaluation sees: differs where labels are made wrong on purpose. labelled, unlabelled, test: int64 ids.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    truth: torch.Tensor
    labelled: np.ndarray
    unlabelled: np.ndarray
    test: np.ndarray
    distributions: torch.Tensor | None = None  # float32 [N, K], what a trained teacher said of each sample


class Views:
    """What a network sees of samples: here, all views are the sample itself."""

    columns = 0
    """Random numbers per sample that `weak` needs."""

    def __init__(self, samples: Samples, config: Config, *, stream: int) -> None:
        self.inputs, self.config, self.stream = samples.inputs, config, stream

    def weak(self, draws: Draws) -> torch.Tensor:
        """The weak views of the drawn images, [B, ...]."""
        return self.inputs[draws.ids]

    def strong(self, weak: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The strong view of the same samples."""
        return weak

    def ready(self, views: torch.Tensor) -> torch.Tensor:
        """The views as networks take them, in floating point."""
        return views


class PointViews(Views):
    """Vectors; the strong view adds Gaussian noise of standard deviation `jitter`."""

    jitter = 0.0

    def strong(self, weak: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Noise of (seed, epoch, id)."""
        noise = Jitter(seed=self.config.seed, stream=self.stream, deviation=self.jitter)
        return noise(weak, draws.ids, draws.epochs)


class ImageViews(Views):
    """uint8 images [N, 3, H, W] as `mpl_scale.data` says: weak.kind shift_crop without a flip, and the strong view."""

    columns = 3

    def __init__(self, samples: Samples, config: Config, *, stream: int) -> None:
        super().__init__(samples, config, stream=stream)
        pad = config.data.weak.pad
        self._padded = torch.nn.functional.pad(samples.inputs, (pad,) * 4, value=config.data.weak.fill)
        self._strong = StrongView(config.data.strong, seed=config.seed, stream=stream)
        self._normalise = Normalise(config.data, device=CPU, dtype=torch.float32)

    def weak(self, draws: Draws) -> torch.Tensor:
        """Shifted by up to `pad` pixels each way."""
        height, width = self.inputs.shape[2:]
        places = torch.from_numpy(np.floor(draws.uniform[:, :2] * (2 * self.config.data.weak.pad + 1)).astype(np.int64))
        rows = places[:, :1] + torch.arange(height)
        columns = places[:, 1:] + torch.arange(width)
        images = self._padded[torch.from_numpy(draws.ids)]
        each = torch.arange(len(images))[:, None, None]
        return images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def strong(self, weak: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The strong views, by RandAugment and cutout."""
        return self._strong(weak, draws.ids, draws.epochs) if len(weak) else weak

    def ready(self, views: torch.Tensor) -> torch.Tensor:
        """The views, normalised."""
        return self._normalise(views)


class Batches:
    """The batches of a phase, in the order of their steps."""

    ahead = 40
    """Steps whose views are made at once: a call costs more than its images, and no view depends on another's image."""

    def __init__(self, samples: Samples, views: Views, phase: Phase, *, seed: int) -> None:
        def plan(ids: np.ndarray, size: int, order: Purpose, view: Purpose) -> SamplePlan:
            rows = np.arange(size, dtype=np.int64)
            streams = {"order_stream": stream_of(order, phase.index), "view_stream": stream_of(view, phase.index)}
            return SamplePlan(ids, batch=size, rows=rows, columns=views.columns, seed=seed, **streams)

        self._samples, self._views = samples, views
        self._plans = (
            plan(samples.labelled, phase.labelled, Purpose.LABELLED_ORDER, Purpose.LABELLED_VIEW),
            plan(samples.unlabelled, phase.unlabelled, Purpose.UNLABELLED_ORDER, Purpose.UNLABELLED_VIEW),
        )
        self._rows = torch.arange(phase.labelled), torch.arange(phase.unlabelled)
        self._made: list[Batch] = []

    def __call__(self, step: int) -> Batch:
        """The global batch of a step."""
        if step % self.ahead == 0:
            self._made = self._make(range(step, step + self.ahead))
        return self._made[step % self.ahead]

    def _make(self, steps: range) -> list[Batch]:
        views, samples = self._views, self._samples
        labelled, unlabelled = (_together([plan.draw(step) for step in steps]) for plan in self._plans)
        seen, weak = views.weak(labelled), views.weak(unlabelled)
        if views.config.data.labelled_view == "strong":
            seen = views.strong(seen, labelled)
        stored = samples.distributions
        parts = {
            "labelled": views.ready(seen),
            "labels": samples.labels[torch.from_numpy(labelled.ids)],
            "weak": views.ready(weak),
            "strong": views.ready(views.strong(weak, unlabelled)),
            "labelled_distributions": None if stored is None else stored[torch.from_numpy(labelled.ids)],
            "unlabelled_distributions": None if stored is None else stored[torch.from_numpy(unlabelled.ids)],
        }
        pieces = {name: value.chunk(len(steps)) for name, value in parts.items() if value is not None}
        return [
            Batch(
                labelled_rows=self._rows[0],
                unlabelled_rows=self._rows[1],
                **{name: piece[index] if index < len(piece) else piece[0] for name, piece in pieces.items()},
            )
            for index in range(len(steps))
        ]


def _together(draws: list[Draws]) -> Draws:
    return Draws(*(np.concatenate([getattr(draw, name) for draw in draws]) for name in ("ids", "epochs", "uniform")))


Watch = Callable[[str, int, dict[str, torch.Tensor]], None]
"""Told (phase, step from 1, the step's metrics)."""


def train(
    run: RunConfig, samples: Samples, views: Callable[..., Views], *, watch: Watch | None = None
) -> tuple[Results, dict[str, Weights]]:
    """Train every phase of a config, then test.

    Args:
        run: as a ds_config says; `mpl_scale.data` is read for views and batch sizes only.
        samples: the data.
        views: (samples, config, stream=) -> Views.
        watch: see Watch.

    Returns:
        Top-1 in percent of every network ("finetuned" apart), means of h and of the cosine over the main phase; and
        the final weights by network.
    """
    mesh, config = build_mesh(device=CPU), run.mpl
    weights: dict[str, Weights] = {}
    results: Results = {}
    for phase in plan_phases(config, check(run, world=1, cuda=False), max_steps=None):
        state = build_state(phase, run, mesh=mesh, weights=weights)
        batches = Batches(samples, views(samples, config, stream=phase.index), phase, seed=config.seed)
        sums: dict[str, torch.Tensor] = {}
        for step in range(phase.steps):
            metrics = dict(phase.method.step(state, batches(step)))
            for name in ("h", "cosine", "student_accuracy", "teacher_accuracy"):
                if name in metrics:
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + metrics[name]
            if watch is not None:
                watch(phase.name, step + 1, metrics)
        weights = collect_weights(state, mesh=mesh)
        found = test(config, samples, views(samples, config, stream=0), weights)
        if phase.name == "finetune":
            found = {name.replace("student", "finetuned"): value for name, value in found.items()}
        results |= found
        if phase.name == "train":
            results |= {f"{name}_mean": total.item() / phase.steps for name, total in sums.items()}
    return results, weights


@torch.no_grad()
def logits_of(config: Config, name: str, weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    """Logits [N, K] of a network in evaluation mode, for inputs as it takes them."""
    kind = "teacher" if name == "teacher" else "student"
    module = build_model(getattr(config.model, kind), config.model, field=f"mpl_scale.model.{kind}", seed=0).eval()
    module.load_state_dict(weights)
    return module(inputs)


def test(config: Config, samples: Samples, views: Views, weights: dict[str, Weights]) -> Results:
    """Top-1 in percent and mean CE on the test part, of every network."""
    inputs, labels = views.ready(samples.inputs[samples.test]), samples.truth[samples.test]
    results = {}
    for name, values in weights.items():
        stored = samples.distributions if name == "teacher" and config.method.name == "reduced_mpl" else None
        logits = logits_of(config, name, values, inputs if stored is None else stored[samples.test])
        results[f"{name}_top1"] = 100 * (logits.argmax(1) == labels).double().mean().item()
        results[f"{name}_loss"] = cross_entropy(logits, labels).mean().item()
    return results
