"""Teachers with hard labels and thresholds, against their papers' formulas: tiny MLP, float64, no batch norm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mpl_scale.checkpoint import find, read_prefix
from mpl_scale.config import load_config
from mpl_scale.config.schema_method import FreeMatchConfig, SoftMatchConfig
from mpl_scale.mesh import build_mesh
from mpl_scale.mpl import LOSSES, METHODS, State
from mpl_scale.mpl.views import Logits
from mpl_scale.trainer.preflight import load_splits
from mpl_scale.types import Batch
from tests.support.configs import tiny, write
from tests.support.perceptrons import (
    CLASSES,
    CPU,
    FEATURES,
    flat,
    gradient,
    make_batch,
    make_state,
    teacher_gradient,
)
from tests.support.ranks import pool
from tests.support.runs import final_state, lines, run
from tests.support.steps import Case, make_batches
from tests.support.steps import make_state as make_step
from tests.support.tiers import full

ALMOST = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums of a few terms in another order
WEIGHT, SUPERVISED, RATE = 2.0, 0.5, 0.0625  # exact in float32, as the schedules are
STEPS, UNLABELLED, IMAGES = 6, 12, 14


def two_views(unlabelled: int = 12, seed: int = 0) -> Batch:
    """Its views differ."""
    generator = torch.Generator().manual_seed(100 + seed)
    strong = torch.randn(unlabelled, FEATURES, generator=generator, dtype=torch.float64)
    return replace(make_batch(labelled=8, unlabelled=unlabelled, seed=seed), strong=strong)


# ---- FixMatch


@pytest.mark.parametrize("slot", ["student", "teacher"])
@pytest.mark.parametrize("threshold", [0.0, 0.38, 1.0])
def test_fixmatch_is_equation_4(slot: str, threshold: float) -> None:
    """l_u = 1 / (mu B) sum_b 1(max q_b >= tau) H(argmax q_b, p(y | A(u_b))), with q_b = p(y | alpha(u_b))."""
    batch, settings = two_views(), {"pseudo_label_threshold": threshold, "supervised_weight": SUPERVISED}
    if slot == "student":
        state = make_state("none", lr=1.0, name="fixmatch", **settings)
    else:
        state = make_state("none", teacher_loss="fixmatch", **settings)
    state.schedules.uda_weight.fill_(WEIGHT)
    network = getattr(make_state("none"), slot).module
    total, confident = torch.zeros((), dtype=torch.float64), 0
    for weak, strong in zip(batch.weak, batch.strong, strict=True):
        q = network(weak).detach().softmax(0)
        if q.max() >= threshold:
            total, confident = total - network(strong).log_softmax(0)[q.argmax()], confident + 1
    assert {0.0: confident == 12, 0.38: 0 < confident < 12, 1.0: confident == 0}[threshold]
    expected = SUPERVISED * F.cross_entropy(network(batch.labelled), batch.labels) + WEIGHT * total / 12
    if slot == "student":
        before = flat(state.student.module)
        METHODS["fixmatch"].step(state, batch)
        moved = before - flat(state.student.module)
    else:
        moved = teacher_gradient(state, batch)
    torch.testing.assert_close(moved, gradient(network, expected), **ALMOST)


# ---- what the papers of the losses that adapt say, in plain loops


class Flex:
    """Algorithm 1: the threshold is of the status before the batch."""

    buffers = ("status",)

    def __init__(self, threshold: float) -> None:
        self.tau, self.status = threshold, [-1] * IMAGES
        self.used: list[float] = []

    def __call__(self, q: torch.Tensor, strong: torch.Tensor, ids: list[int]) -> torch.Tensor:
        sigma = [self.status.count(c) for c in range(CLASSES)]
        unused = self.status.count(-1)
        if max(sigma) < unused:
            beta = [s / max(max(sigma), IMAGES - sum(sigma)) for s in sigma]  # eq. 11
        else:
            beta = [s / max(sigma) for s in sigma]  # eq. 6
        thresholds = [b / (2 - b) * self.tau for b in beta]  # eq. 12
        for row, image in zip(q, ids, strict=True):
            if row.max() > self.tau:
                self.status[image] = int(row.argmax())
        kept = [bool(row.max() > thresholds[row.argmax()]) for row in q]
        self.used.append(sum(kept) / len(q))
        return sum(k * -s.log_softmax(0)[row.argmax()] for k, row, s in zip(kept, q, strong, strict=True)) / len(q)

    def kept(self) -> dict[str, torch.Tensor]:
        return {"status": torch.tensor([*self.status, -1], dtype=torch.int32)}


class Free:
    """Equations 5 to 12."""

    def __init__(self, decay: float, fairness: float) -> None:
        self.decay, self.fairness, self.tau = decay, fairness, torch.tensor(1 / CLASSES, dtype=torch.float64)
        self.p = self.h = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
        self.used: list[float] = []

    def __call__(self, q: torch.Tensor, strong: torch.Tensor, ids: list[int]) -> torch.Tensor:
        def moved(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return self.decay * old + (1 - self.decay) * new

        self.tau = moved(self.tau, q.max(1).values.mean())
        self.p, self.h = moved(self.p, q.mean(0)), moved(self.h, F.one_hot(q.argmax(1), CLASSES).double().mean(0))
        kept = q.max(1).values > (self.p / self.p.max() * self.tau)[q.argmax(1)]
        self.used.append(kept.double().mean().item())
        loss = (F.cross_entropy(strong, q.argmax(1), reduction="none") * kept).mean()
        predicted = strong.softmax(1)[kept]
        if not len(predicted):
            return loss
        seen = torch.bincount(predicted.argmax(1), minlength=CLASSES).double() / len(q)
        there = seen > 0
        wanted, found = self.p / self.h, (predicted.sum(0) / len(q))[there] / seen[there]
        log = (found / found.sum()).log()
        return loss + self.fairness / WEIGHT * ((wanted / wanted.sum())[there] * log).sum()

    def kept(self) -> dict[str, torch.Tensor]:
        return {"confidence": self.tau, "probabilities": self.p, "histogram": self.h}


class Soft:
    """Equations 7 to 10."""

    def __init__(self, settings: SoftMatchConfig) -> None:
        self.settings, self.mean, self.variance = settings, 1 / CLASSES, 1.0
        self.p: torch.Tensor | None = None
        self.used: list[float] = []

    def __call__(self, q: torch.Tensor, strong: torch.Tensor, ids: list[int]) -> torch.Tensor:
        m, aligned = self.settings.decay, q
        if self.settings.alignment == "uniform":
            self.p = q.mean(0) if self.p is None else m * self.p + (1 - m) * q.mean(0)
            aligned = q * (1 / CLASSES) / self.p
            aligned = aligned / aligned.sum(1, keepdim=True)
        c = aligned.max(1).values
        self.mean = m * self.mean + (1 - m) * c.mean()
        self.variance = m * self.variance + (1 - m) * c.var(correction=1)
        gaussian = torch.exp(-((c - self.mean) ** 2) / (2 * self.variance / self.settings.sigmas**2))
        weights = self.settings.max_weight * torch.where(c < self.mean, gaussian, 1.0)
        self.used.append(weights.mean().item())
        return (weights * F.cross_entropy(strong, q.argmax(1), reduction="none")).mean()

    def kept(self) -> dict[str, torch.Tensor]:
        none = torch.zeros(CLASSES, dtype=torch.float64)
        return {"mean": self.mean, "variance": self.variance, "probabilities": none if self.p is None else self.p}


SOFT, PRINTED = SoftMatchConfig(decay=0.5, max_weight=0.8, sigmas=2.0), SoftMatchConfig(decay=0.5)
EVEN, FAST = FreeMatchConfig(decay=0.5, fairness_weight=0.0), FreeMatchConfig(decay=0.5, fairness_weight=0.7)
CASES = {
    "flexmatch": ({"pseudo_label_threshold": 0.45}, lambda: Flex(0.45)),
    "freematch, thresholds": ({"freematch": EVEN}, lambda: Free(0.5, 0.0)),
    "freematch": ({"freematch": FAST}, lambda: Free(0.5, 0.7)),
    "softmatch": ({"softmatch": SOFT}, lambda: Soft(SOFT)),
    "softmatch, unaligned": (
        {"softmatch": SOFT.model_copy(update={"alignment": "none"})},
        lambda: Soft(SOFT.model_copy(update={"alignment": "none"})),
    ),
    "softmatch, as printed": ({"softmatch": PRINTED}, lambda: Soft(PRINTED)),
}


def batches() -> list[Batch]:
    """With the places of their images, each once in a batch; far from 0, so that networks are of many opinions."""
    found = []
    for step in range(STEPS):
        ids = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(step))[:UNLABELLED]
        batch = two_views(UNLABELLED, seed=step)
        far = {name: 6 * getattr(batch, name) for name in ("labelled", "weak", "strong")}
        found.append(replace(batch, **far, unlabelled_ids=ids))
    return found


def trained(case: str, slot: str, *, micro_batches: int = 1, deferred: bool = False) -> State:
    """A state after some steps on this rank's part of the batches."""
    mesh, loss = build_mesh(device=CPU), case.partition(",")[0]
    settings = {"supervised_weight": SUPERVISED, **CASES[case][0]}
    named = {"name": loss} if slot == "student" else {"teacher_loss": loss}
    state = make_state("none", lr=RATE if slot == "student" else 0.0, teacher_lr=RATE, **named, **settings)
    state.schedules.uda_weight.fill_(WEIGHT)
    state.loss_buffers = LOSSES[loss]().buffers(classes=CLASSES, images=IMAGES)
    state.world_group, state.data_ranks = mesh.world_group, mesh.data
    state.micro_batches, state.deferred_teacher = micro_batches, deferred
    step = METHODS[loss if slot == "student" else "mpl"].step
    for batch in batches():
        own = {name: tensor.chunk(mesh.data)[mesh.data_index] for name, tensor in batch.tensors().items()}
        step(state, batch.with_tensors(own))
    return state


def outcome(case: str, slot: str, micro_batches: int, deferred: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    state = trained(case, slot, micro_batches=micro_batches, deferred=deferred)
    return flat(getattr(state, slot).module), state.loss_buffers


def expected(case: str, slot: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network, unlabelled = getattr(make_state("none"), slot).module, CASES[case][1]()
    for batch in batches():
        q, strong = network(batch.weak).detach().softmax(1), network(batch.strong)
        loss = SUPERVISED * F.cross_entropy(network(batch.labelled), batch.labels)
        loss = loss + WEIGHT * unlabelled(q, strong, batch.unlabelled_ids.tolist())
        moved = flat(network) - RATE * gradient(network, loss)
        torch.nn.utils.vector_to_parameters(moved, network.parameters())
    assert any(0 < used < 1 for used in unlabelled.used), "the case is one"
    return flat(network), unlabelled.kept()


@pytest.mark.parametrize("slot", ["student", "teacher"])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_adapts_is_its_papers(case: str, slot: str) -> None:
    """The weights and what the loss keeps, after some steps: as a baseline, and as the loss of MPL's teacher."""
    weights, kept = outcome(case, slot, 1, False)
    wanted, buffers = expected(case, slot)
    assert kept.keys() == buffers.keys()
    for name, value in buffers.items():
        torch.testing.assert_close(kept[name], torch.as_tensor(value, dtype=kept[name].dtype), **ALMOST)
    torch.testing.assert_close(weights, wanted, **ALMOST)


@pytest.mark.parametrize("case", ["flexmatch", "freematch", "softmatch"])
def test_it_adapts_to_the_batch_of_all_ranks_and_micro_batches(case: str) -> None:
    """Two ranks of two micro-batches, of a baseline and of a deferred teacher, against the whole batch at once."""
    for slot, deferred in (("student", False), ("teacher", True)):
        weights, kept = outcome(case, slot, 1, False)
        found = [outcome(case, slot, 2, deferred), *pool(2).run(outcome, case, slot, 2, deferred)]
        for others, buffers in found:
            torch.testing.assert_close(others, weights, **ALMOST)
            for name, value in kept.items():
                torch.testing.assert_close(buffers[name], value, **ALMOST)
        (_, first), (_, second) = found[1:]
        assert all(torch.equal(first[name], second[name]) for name in kept)


def test_flexmatch_starts_with_every_class_and_ends_with_the_sure_ones() -> None:
    """A threshold of 0 while no image is learnt; of an image that a batch has twice, the larger label is kept."""
    state, loss = make_state("none", teacher_loss="flexmatch", pseudo_label_threshold=0.8), LOSSES["flexmatch"]()
    state.loss_buffers = loss.buffers(classes=CLASSES, images=6)
    batch = replace(make_batch(unlabelled=4), unlabelled_ids=torch.tensor([5, 2, 5, 0]))
    weak = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [1, 0, 0]], dtype=torch.float64)
    loss.adapt(state, [batch], [Logits(weak, weak, weak)])
    assert loss.thresholds.tolist() == [0, 0, 0]
    assert state.loss_buffers["status"].tolist() == [-1, -1, 1, -1, -1, 2, -1]
    loss.adapt(state, [batch], [Logits(weak, weak, weak)])
    assert loss.thresholds.tolist() == pytest.approx([0, 0.8 * (1 / 4) / (7 / 4), 0.8 * (1 / 4) / (7 / 4)])
    assert loss.weights(state.method, weak.softmax(1)).tolist() == [1, 1, 1, 1]


def test_flexmatch_without_ids_says_so() -> None:
    state = make_state("none", lr=1.0, name="flexmatch")
    state.loss_buffers = LOSSES["flexmatch"]().buffers(classes=CLASSES, images=IMAGES)
    with pytest.raises(ValueError, match=r"flexmatch keeps a status .* this batch does not say which images it has"):
        METHODS["flexmatch"].step(state, two_views())


# ---- in a run


def of_a_width_group(loss: str, width: int) -> dict[str, torch.Tensor]:
    case = Case(loss=loss)
    mesh = build_mesh(device=CPU, width=width)
    step, state = make_step(case, mesh)
    for batch in make_batches(case, mesh, 3):
        step(state, batch)
    return state.loss_buffers


@pytest.mark.parametrize("loss", ["flexmatch", full("freematch"), full("softmatch")])
def test_ranks_of_one_image_agree(loss: str) -> None:
    """Bit by bit, and with the rank that has whole images; float32 sums in another order, over three steps."""
    alone, (first, second) = of_a_width_group(loss, 1), pool(2).run(of_a_width_group, loss, 2)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4)


def test_a_skipped_step_leaves_the_thresholds_as_they_were() -> None:
    case = Case(loss="freematch", skipping=True)
    mesh = build_mesh(device=CPU)
    step, state = make_step(case, mesh)
    batch, other = make_batches(case, mesh, 2)
    step(state, batch)
    before = {name: value.clone() for name, value in state.loss_buffers.items()}
    state.schedules.student_lr.fill_(math.nan)
    step(state, other)
    assert all(torch.equal(state.loss_buffers[name], value) for name, value in before.items())


def make_config(folder: Path, loss: str) -> str:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["method"] |= {"teacher_loss": loss, "pseudo_label_threshold": 0.15}
    return write(folder, raw)


@pytest.mark.parametrize("loss", ["flexmatch", full("freematch"), full("softmatch")])
def test_a_run_resumes_bitwise(tmp_path: Path, loss: str) -> None:
    """Stopped in the warm-up and in the main phase, whose checkpoint has the loss's buffers.

    tests/test_elastic.py resumes on other ranks.
    """
    config = make_config(tmp_path, loss)
    pool(2).run(run, config, str(tmp_path / "whole"))
    for steps in (2, 5):
        pool(2).run(run, config, str(tmp_path / "stopped"), steps)
    kept = read_prefix(find(tmp_path / "stopped" / "checkpoints")[0], "loss")
    assert kept.keys() == LOSSES[loss]().buffers(classes=1, images=1).keys()
    if loss == "flexmatch":
        assert len(kept["status"]) == len(load_splits(load_config(config)).unlabelled) + 1
        assert (kept["status"][:-1] >= 0).any()
    pool(2).run(run, config, str(tmp_path / "stopped"))
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
