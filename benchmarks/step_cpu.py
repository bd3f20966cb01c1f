"""The MPL step alone on one CPU core: WideResNet-28-2, 8 labelled images, mu 7; images per second and CPU seconds.

    python -m benchmarks.step_cpu --precision fp32 bf16
    python -m benchmarks.step_cpu --peer peer.py --output result.json

A peer is a file with a function `make_step(teacher_state, student_state, config) -> step(batch)` like the one here,
whose step returns nothing or anything and has `teacher` and `student` modules or state dicts to compare afterwards. It
takes turns with ours on the same weights and batches: A B A B.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import provenance, write
from mpl_scale.config.presets import apply_preset
from mpl_scale.config.schema import MethodConfig, ModelConfig, NetworkConfig, OptimConfig, ParallelConfig
from mpl_scale.engine import build_network
from mpl_scale.engine.graph import StepRunner
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.models.kernels import Mode
from mpl_scale.mpl import METHODS, Baseline, MovingAverage, Network, Schedules, State
from mpl_scale.resolve import choose_kernels
from mpl_scale.types import Batch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""x_l [B, 3, 32, 32], y_l int64 [B], x_u [U, 3, 32, 32], x_s [U, 3, 32, 32]."""
PORT_KEYS = {"conv1.": "stem.", "bn1.": "bn.", "fc.": "classifier."}


@dataclass(frozen=True)
class Config:
    """What both sides compute: the popular port's maths (preset kekmodel_compat) on its network, by default."""

    precision: str = "fp32"
    compiled: bool | None = None  # batch norm and optimisers as compiled loops; None: as a run chooses
    channels_last: bool = True
    preset: str = "kekmodel_compat"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    uda_weight: float = 8.0
    threshold: float = 0.6
    temperature: float = 1.0
    ema_decay: float = 0.995
    slope: float = 0.1
    bn_momentum: float = 0.001
    bn_eps: float = 1e-5


class Step:
    """Calls the step on (x_l, y_l, x_u, x_s); `teacher` and `student` are the networks' state dicts of now."""

    def __init__(self, state: State, config: Config) -> None:
        self._state, self._config = state, config
        self._run = StepRunner(METHODS["mpl"].step, state, capture=False)

    def __call__(self, batch: Tensors) -> Mapping[str, torch.Tensor]:
        layout = torch.channels_last if self._config.channels_last else torch.contiguous_format
        labelled, labels, weak, strong = (x.contiguous(memory_format=layout) if x.ndim == 4 else x for x in batch)
        rows, unlabelled_rows = torch.arange(len(labelled)), torch.arange(len(weak))
        return self._run(Batch(labelled, labels, rows, weak, strong, unlabelled_rows))

    @property
    def teacher(self) -> dict[str, torch.Tensor]:
        assert self._state.teacher is not None
        return dict(self._state.teacher.module.state_dict())

    @property
    def student(self) -> dict[str, torch.Tensor]:
        assert self._state.student is not None
        return dict(self._state.student.module.state_dict())


def make_step(
    teacher_state: Mapping[str, torch.Tensor],
    student_state: Mapping[str, torch.Tensor],
    config: Config | Mapping[str, Any] | None = None,
) -> Step:
    """A step from initial weights.

    Args:
        teacher_state: a state dict of wide_resnet28_2, under this package's keys or the port's.
        student_state: likewise.
        config: fields of `Config` that differ from its defaults.

    Raises:
        ValueError: an unknown field, or weights of another network.
    """
    if not isinstance(config, Config):
        given = dict(config or {})
        unknown = given.keys() - {field.name for field in fields(Config)}
        if unknown:
            raise ValueError(f"step_cpu: unknown config {sorted(unknown)}; known: {[f.name for f in fields(Config)]}")
        config = Config(**given)
    if config.precision not in ("fp32", "bf16"):
        raise ValueError(f"step_cpu: precision = {config.precision!r}; use fp32 or bf16")
    student = _network(student_state, config)
    constant = torch.full((1,), config.lr)
    state = State(
        method=MethodConfig(
            **apply_preset(
                {
                    "preset": config.preset,
                    "uda": {
                        "weight": config.uda_weight,
                        "temperature": config.temperature,
                        "threshold": config.threshold,
                    },
                }
            )
        ),
        seed=0,
        schedules=Schedules(constant, constant, torch.full((1,), config.uda_weight), torch.ones(1)),
        step=torch.zeros((), dtype=torch.int64),
        teacher=_network(teacher_state, config),
        student=student,
        student_average=MovingAverage(student, decay=config.ema_decay),
        baseline=Baseline(decay=0.99, bias_correction=True, device=torch.device("cpu")),
    )
    return Step(state, config)


def own_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the port's WideResNet under this package's keys; ours as it is."""
    if "stem.weight" in state:
        return dict(state)
    renamed = {}
    for key, value in state.items():
        if key.startswith("block"):
            group, _, index, rest = key.removeprefix("block").split(".", 3)
            if int(group) > 1 and index == "0" and rest.startswith("bn1"):
                continue  # computed there, and dropped
            key = f"blocks.{4 * (int(group) - 1) + int(index)}.{rest.replace('convShortcut', 'shortcut')}"
        else:
            key = next(ours + key.removeprefix(theirs) for theirs, ours in PORT_KEYS.items() if key.startswith(theirs))
        renamed[key] = value
    return renamed


def _network(state: Mapping[str, torch.Tensor], config: Config) -> Network:
    state = own_keys(state)
    kwargs = {
        "stem": len(state["stem.weight"]),
        "slope": config.slope,
        "bare_transitions": "blocks.4.bn1.weight" not in state,
    }
    section = NetworkConfig(name="wide_resnet28_2", kwargs=kwargs)
    classes = len(state["classifier.weight"])
    shared = ModelConfig(
        teacher=section,
        student=section,
        num_classes=classes,
        image_size=32,
        bn_decay=1 - config.bn_momentum,
        bn_eps=config.bn_eps,
    )
    chosen: Mode = choose_kernels(ParallelConfig(), "cpu")[0]
    kernels: Mode = chosen if config.compiled is None else ("eager", "compiled")[config.compiled]
    model = build_model(section, shared, field="step_cpu", seed=0, kernels=kernels)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"step_cpu: these are not the weights of a WideResNet-28-2: {error}") from error
    optim = OptimConfig(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    ds_config = {"bf16": {"enabled": config.precision == "bf16"}}
    mesh = build_mesh(device=torch.device("cpu"))
    return build_network(model, engine="flat", optim=optim, ds_config=ds_config, mesh=mesh, kernels=kernels)


def initial_state(seed: int, *, port: bool = True) -> dict[str, torch.Tensor]:
    """Random weights of the network: the port's variant of it, or the paper's."""
    kwargs = {"stem": 16, "slope": 0.1, "bare_transitions": True} if port else {}
    section = NetworkConfig(name="wide_resnet28_2", kwargs=kwargs)
    shared = ModelConfig(teacher=section, student=section, num_classes=10, image_size=32)
    return dict(build_model(section, shared, field="step_cpu", seed=seed).state_dict())


def random_batch(seed: int, *, labelled: int = 8, mu: int = 7) -> Tensors:
    """Normalised noise in the shape of CIFAR-10."""
    generator = torch.Generator().manual_seed(seed)

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, 3, 32, 32, generator=generator)

    labels = torch.randint(0, 10, (labelled,), generator=generator)
    return images(labelled), labels, images(labelled * mu), images(labelled * mu)


def cpu_seconds(steps: Mapping[str, Callable[[Tensors], Any]], *, rounds: int, count: int) -> dict[str, list[float]]:
    """CPU seconds (all threads) a step, by name and round; turns are taken so that the machine's drift cancels."""
    batches = [random_batch(seed) for seed in range(count)]
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            for batch in batches:
                step(batch)
            found[name].append((time.process_time() - began) / count)
    return found


def _load_peer(path: Path) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = module
    spec.loader.exec_module(module)
    make: Callable[..., Any] = module.make_step
    return make


def largest_difference(ours: Mapping[str, torch.Tensor], theirs: Any) -> float:
    """Between the parameters of two networks, entry by entry. The port's feedback pass moves its running statistics."""
    other = own_keys(theirs.state_dict() if hasattr(theirs, "state_dict") else theirs)
    parameters = [key for key in ours if key.rpartition(".")[2] in ("weight", "bias")]
    return max((ours[key].double() - other[key].double()).abs().max().item() for key in parameters)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--peer", type=Path, help="a file with make_step, to take turns with")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="loops by inductor, or torch's operators; without either, as a run chooses",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    teacher, student = initial_state(0), initial_state(1)
    steps: dict[str, Any] = {
        precision: make_step(teacher, student, {"precision": precision, "compiled": options.compiled})
        for precision in options.precision
    }
    if options.peer is not None:
        steps["peer"] = _load_peer(options.peer)(dict(teacher), dict(student), Config())
    first = random_batch(0)
    for step in steps.values():
        step(first)
    differences = {}
    if options.peer is not None and "fp32" in steps:
        for name in ("teacher", "student"):
            differences[name] = largest_difference(getattr(steps["fp32"], name), getattr(steps["peer"], name))
    images = len(first[0]) + len(first[2])
    found = cpu_seconds(steps, rounds=options.rounds, count=options.steps)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, seconds in medians.items():
        ratio = f", {medians['peer'] / seconds:.2f} times the peer's" if "peer" in medians and name != "peer" else ""
        print(f"{name}: {images / seconds:.1f} img/s, {seconds:.3f} CPU seconds a step{ratio}")
    for name, difference in differences.items():
        print(f"{name} after one fp32 step: largest difference from the peer {difference:.1e}")
    if options.output is not None:
        result = {
            **provenance("benchmarks.step_cpu", torch.device("cpu")),
            "images_per_step": images,
            "cpu_seconds_per_step": found,
            "median": medians,
            "difference_after_one_step": differences,
        }
        write(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
