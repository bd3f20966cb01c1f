"""Runs of one small config on many seeds at once: S perceptrons as one network, each with rows and feedback of its own.

A step of a network of a few hundred weights is all overhead, so 30 runs cost little more than one. It is the trainer's
step on the flat engine. Row r of a batch is of seed r mod S and meets only that seed's weights, so a mean over rows has
S times too small a gradient, which the learning rates make good. Only what the feedback reduces over all weights is
replaced here by the same over each seed's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from benchmarks.in_memory import CPU, Batches, Results, Samples, Views
from mpl_scale.config import RunConfig, check
from mpl_scale.config.schema import Config, NetworkConfig, OptimConfig
from mpl_scale.engine import build_network
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.models.passes import Passes
from mpl_scale.mpl import FEEDBACK_RULES, LOSSES, Network, State
from mpl_scale.mpl.feedback import (
    Directional,
    FeedbackRule,
    PerSample,
    Signal,
    SoftExact,
    StudentUpdate,
    deviations,
    divided,
    overwrite,
)
from mpl_scale.mpl.feedback import labelled_gradient as whole_labelled_gradient
from mpl_scale.mpl.network import GradientShard
from mpl_scale.mpl.training_losses import Mixup
from mpl_scale.trainer.phases import build_state, initial_seed, plan_phases
from mpl_scale.types import Batch, Slice

EACH = "each seed's "


class Stacked(nn.Module):
    """S perceptrons of one shape, weights [S, outputs, inputs]; row r of the input belongs to number r mod S.

    Biases lie in one dimension, [S outputs], as those that weight decay leaves out do.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        layers = [[layer for layer in module.modules() if not list(layer.children())] for module in modules]
        self.count, self.passes = len(modules), Passes()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self._units: list[nn.Module | None] = []
        for group in zip(*layers, strict=True):
            if isinstance(group[0], nn.Linear):
                self.weights.append(torch.stack([cast(nn.Linear, layer).weight.detach() for layer in group]))
                self.biases.append(torch.cat([cast(nn.Linear, layer).bias.detach() for layer in group]))
                self._units.append(None)
            elif not list(group[0].parameters()):
                self._units.append(group[0])
            else:
                raise ValueError(f"{type(group[0]).__name__} cannot be stacked: only linear layers and their units can")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N S, F] -> logits [N S, K]."""
        values, linear = x.view(-1, self.count, x.shape[1]).transpose(0, 1), 0
        for unit in self._units:
            if unit is None:
                bias = self.biases[linear].view(self.count, 1, -1)
                values = torch.baddbmm(bias, values, self.weights[linear].transpose(1, 2))
                linear += 1
            else:
                values = unit(values)
        return values.transpose(0, 1).reshape(len(x), -1)


class EachSeed(FeedbackRule):
    """Base: dots and baselines by seed."""

    count = 0
    layout: Sequence[Slice] = ()
    """Where the parameters lie in the shards; on one rank each is whole, [S, ...]."""

    def dots(self, u: GradientShard, v: GradientShard) -> torch.Tensor:
        """<u, v> of each seed's part, float64 [S]."""
        total = torch.zeros(self.count, dtype=torch.float64)
        for piece in self.layout:
            a, b = (shards[piece.shard].narrow(0, piece.offset, piece.length).view(self.count, -1) for shards in (u, v))
            total += (a * b).sum(1, dtype=torch.float64)
        return total

    def cosines(self, u: GradientShard, v: GradientShard) -> tuple[torch.Tensor, torch.Tensor]:
        """cos of each seed's parts and |u| |v| as if each seed had been alone, float64 [S]."""
        norms = torch.sqrt(self.dots(u, u) * self.dots(v, v)).clamp(min=1e-300)
        return self.dots(u, v) / norms, norms * self.count**2

    def of_rows(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Each seed's value [S] for its rows, [rows]."""
        return values.repeat(rows // self.count)

    def signal(self, state: State, h: torch.Tensor, credit: torch.Tensor, metrics: dict[str, Any]) -> Signal:
        """The credits less each seed's own baseline; the logged h and cosine are means over seeds."""
        baseline = state.baseline.update(h)
        credit = credit if self.soft_labels else credit - self.of_rows(baseline, len(credit))
        return Signal(h=h.mean(), credit=credit, metrics={**metrics, "cosine": h.mean()})


class EachCosine(EachSeed):
    """The rule `cosine`; `sign` -1 is `flipped`."""

    sign = 1.0

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """The signal of each seed; see FeedbackRule.after_update."""
        gradient, _, metrics = whole_labelled_gradient(state, batch, update)
        h = self.sign * self.cosines(update.gradient, gradient)[0]
        return self.signal(state, h, self.of_rows(h, len(update.targets)), metrics)


class EachFlipped(EachCosine):
    """The rule `flipped`, with feedback of its own for each seed."""

    sign = -1.0


class EachDirectional(EachSeed, Directional):
    """The rules with a credit for each row: no row meets another seed's weights, so one derivative serves all seeds."""

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """The signal of each seed; see Directional.after_update."""
        student = cast(Network, state.student)
        gradient, _, metrics = whole_labelled_gradient(state, batch, update)
        h, norms = self.cosines(update.gradient, gradient)
        updated = [shard.detach().clone() for shard in student.master]
        derivative = self._followed(student, gradient, update)
        overwrite(student, updated)
        # Along S g, the gradient a seed would have alone: its derivative is S times that along g.
        credit = derivative * self.of_rows(self.count / norms, len(derivative))[:, None]
        return self.signal(state, h, self.of_size(self._credit(credit, update), state, update), metrics)

    def of_size(self, credit: torch.Tensor, state: State, update: StudentUpdate) -> torch.Tensor:
        """The credits as `feedback.normalise` says."""
        return credit


class EachPerSample(EachDirectional, PerSample):
    """The rule `per_sample`, with feedback of its own for each seed."""


class EachSoftExact(EachDirectional, SoftExact):
    """The rule `soft_exact`, with feedback of its own for each seed."""

    def of_size(self, credit: torch.Tensor, state: State, update: StudentUpdate) -> torch.Tensor:
        """Each seed's credits over their own root mean square, where that is asked for."""
        if state.method.feedback.normalise == "norms":
            return credit
        centred, variance = deviations(credit, update.targets)
        scale = variance.view(-1, self.count).mean(0).sqrt()
        return divided(centred, self.of_rows(scale, len(credit))[:, None])


RULES: dict[str, type[FeedbackRule]] = {
    "none": FeedbackRule,
    "cosine": EachCosine,
    "flipped": EachFlipped,
    "per_sample": EachPerSample,
    "soft_exact": EachSoftExact,
}


@contextmanager
def _registered(rule: str, network: Network | None, count: int) -> Iterator[str]:
    """The rule for these seeds, under a name that lasts as long as the context."""
    settings = {"count": count, "layout": [] if network is None else network.layout}
    name = EACH + rule
    FEEDBACK_RULES[name] = type(name, (RULES[rule],), settings)
    try:
        yield name
    finally:
        FEEDBACK_RULES.pop(name)


def train_many(
    run: RunConfig, samples: Sequence[Samples], views: Callable[..., Views], *, seeds: Sequence[int]
) -> tuple[list[Results], dict[str, Stacked]]:
    """Train every phase of a config for all seeds together.

    Args:
        run: with perceptrons, SGD and no moving average; mixes would mix seeds. Its own seed keys label sampling.
        samples: one for each seed, all of equal size.
        views: (samples, config, stream=) -> Views.
        seeds: of initial weights and of the order of samples.

    Returns:
        Top-1 of each network in percent and, over the main phase, the mean h of all seeds, by seed; the networks.

    Raises:
        ValueError: a method or rule that is not for this.
    """
    config, count, mesh = run.mpl, len(seeds), build_mesh(device=CPU)
    losses = [LOSSES[name] for name in (config.method.name, config.method.teacher_loss) if name in LOSSES]
    mixing = any(issubclass(loss, Mixup) or loss.adapts for loss in losses)
    if config.method.ema_decay or mixing:
        raise ValueError(
            "many seeds at once: set method.ema_decay = 0, and no mixup or thresholds that adapt: they would mix seeds"
        )
    results: list[Results] = [{} for _ in seeds]
    trained: dict[str, Stacked] = {}
    for phase in plan_phases(config, check(run, world=1, cuda=False), max_steps=None):
        state = build_state(phase, run, mesh=mesh, weights={})
        for name in ("teacher", "student"):
            if getattr(state, name) is not None:
                module = trained.get(name) or _initial(config, name, seeds)
                setattr(state, name, _network(module, getattr(phase.optim, name), mesh=mesh))
                getattr(state.schedules, f"{name}_lr").mul_(count)
                trained[name] = module
        state.baseline.average = torch.zeros(count, dtype=torch.float64)
        sources = [
            Batches(own, views(own, with_seed(config, seed), stream=phase.index), phase, seed=seed)
            for own, seed in zip(samples, seeds, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float64)
        with _registered(config.method.feedback.rule, state.student, count) as rule:
            feedback = phase.settings.feedback.model_copy(update={"rule": rule, "baseline": False})
            state.method = phase.settings.model_copy(update={"feedback": feedback})
            for step in range(phase.steps):
                metrics = phase.method.step(state, _interleaved([source(step) for source in sources]))
                total += metrics.get("cosine", 0.0)
        _test(results, trained, config, samples, views, suffix="_finetuned" if phase.name == "finetune" else "")
        if phase.name == "train":
            for values in results:
                values["cosine_mean"] = total.item() / phase.steps
    return results, trained


def with_seed(config: Config, seed: int) -> Config:
    """The config of one of the seeds."""
    return config.model_copy(update={"seed": seed})


def _initial(config: Config, name: str, seeds: Sequence[int]) -> Stacked:
    section: NetworkConfig = getattr(config.model, name)
    field = f"mpl_scale.model.{name}"
    return Stacked([build_model(section, config.model, field=field, seed=initial_seed(seed, name)) for seed in seeds])


def _network(module: Stacked, optim: OptimConfig, *, mesh: Any) -> Network:
    """Under the flat engine; decay is a part of the gradient, so it is divided as the gradient is."""
    decay = {"weight_decay": optim.weight_decay / module.count}
    return build_network(module, engine="flat", optim=optim.model_copy(update=decay), ds_config={}, mesh=mesh)


def _interleaved(batches: Sequence[Batch]) -> Batch:
    """One batch whose rows take turns."""

    def joined(name: str) -> torch.Tensor:
        return torch.stack([getattr(batch, name) for batch in batches], 1).flatten(0, 1)

    named = {name: joined(name) for name in batches[0].tensors() if not name.endswith("rows")}
    return Batch(
        **named,
        labelled_rows=torch.arange(len(named["labelled"])),
        unlabelled_rows=torch.arange(len(named["weak"])),
    )


@torch.no_grad()
def _test(
    results: list[Results],
    trained: dict[str, Stacked],
    config: Config,
    samples: Sequence[Samples],
    views: Callable[..., Views],
    *,
    suffix: str,
) -> None:
    seen = [views(own, config, stream=0).ready(own.inputs[own.test]) for own in samples]
    labels = torch.stack([own.truth[own.test] for own in samples], 1)
    for name, module in trained.items():
        logits = module(torch.stack(seen, 1).flatten(0, 1)).view(*labels.shape, -1)
        right = (logits.argmax(-1) == labels).double().mean(0) * 100
        for values, top1 in zip(results, right.tolist(), strict=True):
            values[f"{name}{suffix}_top1"] = top1


def as_overrides(settings: dict[str, Any]) -> list[str]:
    """Settings as --set takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
