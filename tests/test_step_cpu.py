"""The CPU benchmark's step is the port's maths: one step against plain PyTorch on plain modules, keys of both kinds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.step_cpu import (
    Config,
    cpu_seconds,
    initial_state,
    largest_difference,
    make_step,
    own_keys,
    random_batch,
)
from mpl_scale.models.wide_resnet import wide_resnet28_2

BATCH = random_batch(0, labelled=4, mu=3)


def plain_network(state: dict[str, torch.Tensor], config: Config) -> nn.Module:
    net = wide_resnet28_2(num_classes=10, stem=16, slope=config.slope, bare_transitions=True)
    net.load_state_dict(state)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps, layer.momentum = config.bn_eps, config.bn_momentum
    return net.train()


def sgd(net: nn.Module, config: Config) -> torch.optim.SGD:
    parameters = list(net.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)


def plain_step(teacher: nn.Module, student: nn.Module, config: Config) -> None:
    """Argmax labels of the weak view; new minus old loss, old from the joint batch, times CE on the strong view."""
    x_l, y_l, x_u, x_s = BATCH
    teacher_sgd, student_sgd = sgd(teacher, config), sgd(student, config)
    z_l, z_u, z_s = teacher(torch.cat([x_l, x_u, x_s])).split([len(x_l), len(x_u), len(x_s)])
    probabilities = (z_u.detach() / config.temperature).softmax(-1)
    mask = (probabilities.amax(-1) >= config.threshold).float()
    uda = (-(probabilities * z_s.log_softmax(-1)).sum(-1) * mask).mean()
    s_l, s_s = student(torch.cat([x_l, x_s])).split([len(x_l), len(x_s)])
    old = F.cross_entropy(s_l.detach(), y_l)
    F.cross_entropy(s_s, probabilities.argmax(-1)).backward()
    student_sgd.step()
    with torch.no_grad():
        difference = F.cross_entropy(student(x_l), y_l) - old
    loss = F.cross_entropy(z_l, y_l) + config.uda_weight * uda
    (loss + difference * F.cross_entropy(z_s, z_s.detach().argmax(-1))).backward()
    teacher_sgd.step()


def test_one_step_is_the_ports() -> None:
    """Of float32: roundings of 6e-8 in sums of a thousand terms, times a learning rate of 0.05."""
    config = Config(compiled=False, channels_last=False, threshold=0.1)
    teacher, student = initial_state(0), initial_state(1)
    step = make_step(teacher, student, config)
    step(BATCH)
    plain = [plain_network(state, config) for state in (teacher, student)]
    plain_step(plain[0], plain[1], config)
    for ours, theirs, start in zip((step.teacher, step.student), plain, (teacher, student), strict=True):
        assert largest_difference(ours, theirs) <= 1e-5
        assert largest_difference(start, theirs) > 1e-3  # it moved


def test_the_ports_keys_are_understood() -> None:
    ours = initial_state(3)
    port = {"block2.layer.0.bn1.weight": torch.ones(32)}  # computed there, and dropped
    for key, value in ours.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            group, place = divmod(int(index), 4)
            key = f"block{group + 1}.layer.{place}.{rest.replace('shortcut', 'convShortcut')}"
        port[key.replace("stem.", "conv1.").replace("classifier.", "fc.").removeprefix("")] = value
    port = {f"bn1.{key.removeprefix('bn.')}" if key.startswith("bn.") else key: value for key, value in port.items()}
    renamed = own_keys(port)
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[key], value) for key, value in ours.items())


def test_bf16_follows_and_times_are_taken_in_turns() -> None:
    """Weights are kept in fp32: after a step they differ from fp32's by bf16's rounding of gradients, 2**-8."""
    steps = {
        precision: make_step(initial_state(0), initial_state(1), {"precision": precision, "compiled": False})
        for precision in ("fp32", "bf16")
    }
    for step in steps.values():
        step(BATCH)
    gap = largest_difference(steps["fp32"].teacher, steps["bf16"].teacher)
    assert 0 < gap < 0.1
    found = cpu_seconds({"again": lambda batch: batch[0].sum()}, rounds=3, count=2)
    assert len(found["again"]) == 3


@pytest.mark.parametrize(
    ("config", "message"), [({"speed": 1}, r"unknown config \['speed'\]"), ({"precision": "fp8"}, "use fp32 or bf16")]
)
def test_bad_settings_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_step(initial_state(0), initial_state(1), config)


def test_other_weights_are_refused() -> None:
    state = initial_state(0)
    state["blocks.0.conv1.weight"] = state["blocks.0.conv1.weight"][:3]
    with pytest.raises(ValueError, match="not the weights of a WideResNet-28-2"):
        make_step(state, initial_state(1))
