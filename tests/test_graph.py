"""The step runner: static slots change nothing, drift is refused by name; on a GPU the replay equals the eager step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpl_scale.config.schema import CheckpointConfig, MethodConfig, ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.engine.flat_engine import FlatNetwork
from mpl_scale.engine.graph import StepRunner, why_not_captured
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import METHODS, Baseline, MovingAverage, Schedules, State
from mpl_scale.trainer.phases import collect_weights
from mpl_scale.trainer.snapshots import Snapshots
from mpl_scale.types import Batch

STEPS = 20


def make_state(device: torch.device, optimizer: str = "sgd") -> State:
    """Dropout and drop-path on, a learning rate that changes every step."""
    mesh = build_mesh(device=device)
    network = NetworkConfig(name="test_efficientnet", dropout=0.2, drop_path=0.2)
    if device.type == "cuda":
        network = NetworkConfig(name="tf_efficientnet_b0", dropout=0.2, drop_path=0.2)
    shared = ModelConfig(teacher=network, student=network, num_classes=10, image_size=32)
    optim = OptimConfig(name=optimizer, lr=0.1, weight_decay=1e-4)
    networks = [
        FlatNetwork(build_model(network, shared, field="x", seed=seed).to(device), optim=optim, mesh=mesh)
        for seed in (1, 2)
    ]
    lr = torch.linspace(0.01, 0.1, STEPS, device=device)
    return State(
        method=MethodConfig(ema_decay=0.9),
        seed=5,
        schedules=Schedules(lr, 2 * lr, 10 * lr, torch.ones_like(lr)),
        step=torch.zeros((), dtype=torch.int64, device=device),
        teacher=networks[0],
        student=networks[1],
        student_average=MovingAverage(networks[1], decay=0.9),
        baseline=Baseline(decay=0.9, bias_correction=True, device=device),
    )


def batches(device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)

    def one() -> Batch:
        shapes = [(n, 3, 32, 32) for n in (8, 16, 16)]
        x_l, x_u, x_s = (torch.randint(256, s, generator=generator, dtype=torch.uint8).to(device) for s in shapes)
        y_l = torch.randint(0, 10, (8,), generator=generator).to(device)
        rows = torch.arange(8, device=device), torch.arange(16, device=device)
        return Batch(x_l, y_l, rows[0], x_u, x_s, rows[1], normalise=inputs)

    return [one() for _ in range(STEPS)]


def inputs(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().sub_(127.5).div_(64.0)


def everything(state: State) -> list[torch.Tensor]:
    assert state.teacher is not None
    assert state.student is not None
    assert state.student_average is not None
    tensors = [state.step, state.baseline.average, *state.student_average.shards]
    for network in (state.teacher, state.student):
        tensors += [*network.module.state_dict().values(), *network.master]
        tensors += [shard for shards in network.optimizer_state.values() for shard in shards]
    return [tensor.clone() for tensor in tensors]


def compare(device: torch.device, *, capture: bool, optimizer: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    eager, run = make_state(device, optimizer), make_state(device, optimizer)
    step = METHODS["mpl"].step
    runner = StepRunner(step, run, capture=capture)
    for batch in batches(device):
        expected = {name: value.clone() for name, value in step(eager, batch).items()}
        found = runner(batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4 if capture else 0, atol=1e-5 if capture else 0)
    return list(zip(everything(run), everything(eager), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_static_slots_are_bitwise_the_eager_step(optimizer: str) -> None:
    """The CPU twin of the replay: 20 steps with changing rates, dropout, drop-path and sampling."""
    for found, expected in compare(torch.device("cpu"), capture=False, optimizer=optimizer):
        assert torch.equal(found, expected)


def test_what_lies_between_steps_touches_nothing(tmp_path: Path) -> None:
    """Gathering the weights, evaluating a copy of them and saving a checkpoint, after every step: bitwise no change."""
    device = torch.device("cpu")
    mesh = build_mesh(device=device)
    snapshots = Snapshots(tmp_path, CheckpointConfig(keep=2), mesh, warn=lambda _: None)
    plain, disturbed = make_state(device), make_state(device)
    runners = [StepRunner(METHODS["mpl"].step, state, capture=False) for state in (plain, disturbed)]
    assert disturbed.student is not None
    phase = SimpleNamespace(name="train")
    for step, batch in enumerate(batches(device)[:6], start=1):
        for runner in runners:
            runner(batch)
        weights = collect_weights(disturbed, mesh=mesh)
        copied = copy.deepcopy(disturbed.student.module).eval()
        copied.load_state_dict(weights["ema"])
        with torch.no_grad():
            copied(batch.normalise(batch.weak))
        snapshots.save(phase, disturbed, step=step, global_step=step, metadata={"results": {}, "seconds": 0.0})
    for found, expected in zip(everything(disturbed), everything(plain), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the test above is its CPU twin")
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_the_replay_equals_the_eager_step(optimizer: str) -> None:
    """cuDNN may choose other algorithms under capture: float32 rounding over 20 steps."""
    for found, expected in compare(torch.device("cuda", 0), capture=True, optimizer=optimizer):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_drift_is_refused_by_name() -> None:
    device = torch.device("cpu")
    first, second, *_ = batches(device)
    runner = StepRunner(METHODS["mpl"].step, make_state(device), capture=False)
    runner(first)
    with pytest.raises(ValueError, match=r"batch.labels is torch.int64 \[4\] on cpu, .* \[8\]"):
        runner(replace(second, labels=second.labels[:4]))
    with pytest.raises(ValueError, match=r"batch.weak is torch.float64"):
        runner(replace(second, weak=second.weak.double()))


def test_the_reason_for_eager_steps() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert why_not_captured(graph="auto", device=cpu, flat_engine=True) == "the run computes on cpu"
    assert why_not_captured(graph="auto", device=cuda, flat_engine=True) is None
    assert "engine deepspeed" in str(why_not_captured(graph="auto", device=cuda, flat_engine=False))
    assert why_not_captured(graph="off", device=cuda, flat_engine=True) == "mpl_scale.parallel.graph = off"
    with pytest.raises(ValueError, match="graph = required, but the run computes on cpu"):
        why_not_captured(graph="required", device=cpu, flat_engine=True)
