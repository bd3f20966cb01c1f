"""What h sees under momentum: <g_l, g_u> and the derivative along the update really made, against the true loss drop.

    python -m benchmarks.through_optimizer --seeds 0 --output benchmarks/results/cpu/through_optimizer.json

scikit-learn's digits as vectors, a perceptron of two hidden layers of 64, float64, 400 steps of 20 labelled and 60
unlabelled images, a supervised teacher (benchmarks/feedback.py, "few labels"). At a step of the student from theta to
theta', with g_l taken at theta':

    drop      L(theta) - L(theta')      the labelled loss, on the same batch
    plain     lr <g_l, g_u>             what the rules `dot` and `cosine` see
    through   <g_l, theta - theta'>     along the update, momentum and preconditioner included

"run" correlates over the steps of a run. "labels" correlates over 16 draws of pseudo labels in one state, every tenth
step: only this tells good labels from bad ones, which is what the teacher is told; a momentum of earlier steps is the
same for all of them. Last, students with momentum are trained with the cosine of either as h.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.in_memory import CPU, Samples
from benchmarks.paired import Kept, paired, written
from benchmarks.report import provenance, write
from benchmarks.small_digits import Digits, make_digits
from mpl_scale.config.schema import OptimConfig
from mpl_scale.models.small import TwoMoonsMLP
from mpl_scale.mpl.losses import cross_entropy
from mpl_scale.optim import OPTIMIZERS, ShardOptimizer

STEPS, LABELLED, UNLABELLED, EVERY, DRAWS, DECAY = 400, 20, 60, 10, 16, 0.99
STUDENTS = {
    "SGD": OptimConfig(lr=0.1, momentum=0.0, nesterov=False),
    "SGD, Nesterov 0.9": OptimConfig(lr=0.1, momentum=0.9),
    "RMSProp": OptimConfig(name="rmsprop", lr=0.003, momentum=0.0),
    "RMSProp, momentum 0.9": OptimConfig(name="rmsprop", lr=0.001, momentum=0.9),
}
TEACHER = OptimConfig(lr=0.1, momentum=0.9)
TRAINED = ("SGD, Nesterov 0.9", "RMSProp, momentum 0.9")
RULES = ("none", "plain", "through")
PAIRS = (("plain", "none"), ("through", "none"), ("through", "plain"))
FIGURES = ("drop", "plain", "through")
Vectors = list[torch.Tensor]


def inner(a: Vectors, b: Vectors) -> float:
    """<a, b> of two lists of tensors."""
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def cosine(a: Vectors, b: Vectors) -> float:
    """Of the angle between them."""
    return inner(a, b) / max(1e-300, (inner(a, a) * inner(b, b)) ** 0.5)


class Learner:
    """A perceptron and its optimiser, whose steps can be taken back."""

    def __init__(self, config: OptimConfig, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.module: nn.Module = TwoMoonsMLP(num_classes=10, hidden=64, inputs=64, relu=True).double()
        self.weights = list(self.module.parameters())
        groups = [{"params": self.weights, "weight_decay": 5e-4}]
        self.optimizer: ShardOptimizer = OPTIMIZERS[config.name](groups, config)
        self.optimizer.init_state()
        self._state = [value for own in self.optimizer.state.values() for value in own.values()]

    def gradient(self, loss: torch.Tensor) -> Vectors:
        """Of a loss, by parameter."""
        return list(torch.autograd.grad(loss, self.weights))

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, []."""
        return cross_entropy(self.module(x), targets).mean()

    def apply(self, gradient: Vectors, *, lr: float) -> None:
        """A step of the optimiser."""
        for weight, own in zip(self.weights, gradient, strict=True):
            weight.grad = own
        self.optimizer.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64)
        self.optimizer.step()

    def saved(self) -> Vectors:
        """Copies of the weights and of the optimiser's state."""
        return [value.detach().clone() for value in (*self.weights, *self._state)]

    @torch.no_grad()
    def restore(self, saved: Vectors) -> None:
        """Go back to what was saved."""
        for value, before in zip((*self.weights, *self._state), saved, strict=True):
            value.copy_(before)


@dataclass(frozen=True)
class Seen:
    """What a step of the student shows: the three figures of the module's docstring, and the two cosines."""

    drop: float
    plain: float
    through: float
    cosines: dict[str, float]


def student_step(
    student: Learner, x: torch.Tensor, labels: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor], lr: float
) -> Seen:
    """A step on pseudo labels, and what it did to the labelled loss. own: labelled inputs and labels."""
    with torch.no_grad():
        before, old = [weight.detach().clone() for weight in student.weights], student.loss(*own)
    g_u = student.gradient(student.loss(x, labels))
    student.apply(g_u, lr=lr)
    new = student.loss(*own)
    g_l = student.gradient(new)
    moved = [was - weight.detach() for was, weight in zip(before, student.weights, strict=True)]
    cosines = {"none": 0.0, "plain": cosine(g_l, g_u), "through": cosine(g_l, moved)}
    return Seen(float(old - new.detach()), lr * inner(g_l, g_u), inner(g_l, moved), cosines)


def run(name: str, rule: str, *, seed: int, measure: bool) -> tuple[float, list[Seen], list[list[Seen]]]:
    """Train a teacher and a student by one rule.

    Returns:
        Accuracy of the student in percent; where `measure`, also what each step and each draw of labels showed.
    """
    samples = make_digits(Digits(per_class=4, vectors=True), seed=seed)
    student, teacher = Learner(STUDENTS[name], seed=2 * seed), Learner(TEACHER, seed=2 * seed + 1)
    generator = torch.Generator().manual_seed(seed)
    steps, draws, average = [], [], 0.0
    for step, (own, x) in enumerate(batches(samples, generator)):
        share = 0.5 * (1 + np.cos(np.pi * step / STEPS))
        lr = STUDENTS[name].lr * share
        logits = teacher.module(x)
        chances = logits.detach().softmax(1)
        if measure and step % EVERY == 0:
            saved = student.saved()
            found = []
            for labels in torch.multinomial(chances, DRAWS, replacement=True, generator=generator).T:
                found.append(student_step(student, x, labels, own, lr))
                student.restore(saved)
            draws.append(found)
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
        seen = student_step(student, x, labels, own, lr)
        steps.append(seen)
        h = seen.cosines[rule]
        average = DECAY * average + (1 - DECAY) * h
        h -= average / (1 - DECAY ** (step + 1))
        loss = teacher.loss(*own) + h * cross_entropy(logits, labels).mean()
        teacher.apply(teacher.gradient(loss), lr=TEACHER.lr * share)
    with torch.no_grad():
        found_labels = student.module(samples.inputs[samples.test].double()).argmax(1)
    return 100 * float((found_labels == samples.truth[samples.test]).double().mean()), steps, draws


def batches(
    samples: Samples, generator: torch.Generator
) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Labelled inputs with labels, and unlabelled inputs, of every step, drawn without replacement."""
    inputs = samples.inputs.double()
    for _ in range(STEPS):
        own, others = (
            torch.from_numpy(ids)[torch.randperm(len(ids), generator=generator)[:count]]
            for ids, count in ((samples.labelled, LABELLED), (samples.unlabelled, UNLABELLED))
        )
        yield (inputs[own], samples.truth[own]), inputs[others]


def correlations(steps: list[Seen], draws: list[list[Seen]]) -> dict[str, float]:
    """Of drop with plain and through: over the run, and the mean of those over the draws of one state; equal signs."""

    def table(seen: list[Seen]) -> np.ndarray:
        return np.array([[getattr(one, figure) for figure in FIGURES] for one in seen])

    whole, found = table(steps), {}
    each = np.mean([np.corrcoef(table(state), rowvar=False)[0] for state in draws], axis=0)
    for column, figure in enumerate(FIGURES[1:], 1):
        found[f"run, {figure}"] = float(np.corrcoef(whole, rowvar=False)[0, column])
        found[f"sign, {figure}"] = float(np.mean(np.sign(whole[:, 0]) == np.sign(whole[:, column])))
        found[f"labels, {figure}"] = float(each[column])
    return found


def measured(kept: Kept, name: str, *, seeds: int) -> dict[str, float]:
    """The correlations of a student's optimiser, mean over seeds."""
    rows = []
    for seed in range(seeds):

        def found(seed: int = seed) -> dict[str, float]:
            _, steps, draws = run(name, "plain", seed=seed, measure=True)
            return correlations(steps, draws)

        rows.append(kept(f"{name}/measured/{seed}", found))
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def trained(kept: Kept, name: str, rule: str, *, seeds: int) -> list[float]:
    """Accuracy in percent of students trained by a rule, by seed."""
    values = []
    for seed in range(seeds):

        def found(seed: int = seed) -> dict[str, float]:
            return {"top1": run(name, rule, seed=seed, measure=False)[0]}

        values.append(kept(f"{name}/{rule}/{seed}", found)["top1"])
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="of the trained students; 0: train none")
    parser.add_argument("--measured", type=int, default=1, help="seeds of the correlations")
    parser.add_argument("--keep", type=Path, default=Path("runs/through_optimizer.jsonl"), help="runs that are done")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(options.keep)
    document: dict[str, Any] = {"kind": "through_optimizer", **provenance("benchmarks.through_optimizer", CPU)}
    document |= {"correlations": {}, "trained": {}}
    for name in STUDENTS:
        found = document["correlations"][name] = measured(kept, name, seeds=options.measured)
        print(f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in found.items())}", flush=True)
    for name in TRAINED if options.seeds else ():
        top1 = {rule: trained(kept, name, rule, seeds=options.seeds) for rule in RULES}
        pairs = {f"{a} - {b}": paired(top1[a], top1[b]) for a, b in PAIRS}
        document["trained"][name] = {"student_top1": top1, "paired": pairs}
        for rule, values in top1.items():
            print(f"{name}, h {rule}: {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")
        for pair, statistics in pairs.items():
            print(f"{name}, {pair}: {written(statistics)}", flush=True)
    if options.output is not None:
        write(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
