"""What a CUDA graph forbids, counted on the CPU: device values read on the host, storage that comes or moves.

A dispatch mode sees every operator the step runs; those that bring a value or a data-dependent shape to the host are
counted. The same counter must see a planted `.item()`, or it would prove nothing.
"""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from mpl_scale.config.schema import DataConfig, FeedbackConfig, ModelConfig, NetworkConfig, OptimConfig
from mpl_scale.data.normalise import Normalise
from mpl_scale.engine import build_network
from mpl_scale.engine.graph import StepRunner
from mpl_scale.engine.recompute import apply_recompute
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.mpl import LOSSES, METHODS, PseudoLabels, State
from mpl_scale.mpl.skipping import SkipNonfinite
from mpl_scale.spatial import input_columns, parallelize
from tests.support.dispatch import HostReads
from tests.support.ranks import pool
from tests.support.reference import Settings, make_batches
from tests.support.sharded import make_network, make_state, rank_batch
from tests.support.tiers import full


def storages(state: State) -> set[int]:
    """Addresses of everything that lives from step to step."""
    assert state.student_average is not None
    tensors = [state.step, state.baseline.average, *state.student_average.shards, *state.loss_buffers.values()]
    assert state.noted is not None
    tensors += [state.noted.labels, state.noted.confidence]
    for network in (state.teacher, state.student):
        assert network is not None
        tensors += [*network.module.parameters(), *network.module.buffers(), *network.master]
        tensors += [p.grad for p in network.module.parameters() if p.grad is not None]
        tensors += [shard for shards in network.optimizer_state.values() for shard in shards]
        tensors += network.optimizer_counters.values()
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def count_host_reads(method: str, rule: str, skipping: bool = False) -> tuple[Counter[str], bool]:
    """Host reads of the third step, and whether the state stayed in the same memory since the first."""
    s, mesh = Settings(), build_mesh(device=torch.device("cpu"))
    networks = [make_network(seed, s, torch.float32, width, "flat", {}, mesh) for seed, width in ((1, 6), (2, 5))]
    state = make_state(s, *networks, mesh)
    state.noted = PseudoLabels(s.unlabelled // mesh.data, device=mesh.device)
    labels = "soft" if rule == "soft_exact" else "sampled"
    feedback = FeedbackConfig(rule=rule)
    state.method = state.method.model_copy(update={"feedback": feedback, "pseudo_labels": labels})
    if loss := METHODS[method].training_loss(state.method):
        state.loss_buffers = LOSSES[loss]().buffers(classes=s.classes, images=s.unlabelled)
    batch = rank_batch(make_batches(s, torch.float32)[0], mesh)
    batch = replace(batch, unlabelled_ids=batch.unlabelled_rows)
    step = SkipNonfinite(METHODS[method].step, state) if skipping else METHODS[method].step
    step(state, batch)
    before = storages(state)
    step(state, batch)
    with HostReads() as counter:
        step(state, batch)
    return counter.seen, storages(state) == before


STEPS = [
    *(("mpl", r) for r in ("cosine", "dot", "loss_difference", "none", "flipped", "per_sample", "soft_exact")),
    *((m, "cosine") for m in ("supervised", "uda", "mixup", "cutmix", "pseudo_label", "noisy_student")),
    *((m, "cosine") for m in ("teacher_warmup", "fixmatch", "flexmatch", "freematch", "softmatch")),
]
OVER_RANKS = [("mpl", "cosine"), ("mpl", "per_sample"), ("uda", "cosine")]
"""In `make test` on two ranks too."""


@pytest.mark.parametrize(
    ("world", "method", "rule"),
    [
        *((1, *step) for step in STEPS),
        *((2, *step) if step in OVER_RANKS else full(2, *step) for step in STEPS),
    ],
)
def test_step_never_waits_for_the_device(world: int, method: str, rule: str) -> None:
    results = pool(world).run(count_host_reads, method, rule) if world > 1 else [count_host_reads(method, rule)]
    for reads, in_place in results:
        assert not reads
        assert in_place


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_can_be_skipped_never_waits_either(world: int) -> None:
    given = ("mpl", "cosine", True)
    results = pool(world).run(count_host_reads, *given) if world > 1 else [count_host_reads(*given)]
    assert all(not reads and in_place for reads, in_place in results)


def live_storages() -> dict[int, int]:
    """Bytes by address of every tensor storage of this process."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, FakeTensor):  # the compiler's, without memory
            continue
        if isinstance(thing, torch.Tensor) and thing.untyped_storage().nbytes():
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return (128 + 64 * images).clamp(0, 255).byte().contiguous()


def whole_step(width: int, micro_batches: int, recompute: str) -> tuple[Counter[str], int, list[int]]:
    """The step with all that a run puts into it: pixels, RMSProp, clipping, EMA, drop-path, recomputation, halos.

    Host reads of the fourth step, bytes alive after the second, and the sizes of storages that the two after it added
    or moved.
    """
    mesh = build_mesh(device=torch.device("cpu"), width=width)
    section = NetworkConfig(name="test_efficientnet", dropout=0.1, drop_path=0.1)
    shared = ModelConfig(teacher=section, student=section, num_classes=7, image_size=32)
    optim = OptimConfig(name="rmsprop", lr=0.01, weight_decay=1e-3)
    networks = []
    for seed in (1, 2):
        model = build_model(section, shared, field="m", seed=seed, group=mesh.world_group)
        model = apply_recompute(parallelize(model, mesh=mesh, image_size=32, switch_at="never"), recompute)
        clipped = {"gradient_clipping": 0.5, "gradient_accumulation_steps": micro_batches}
        networks.append(build_network(model, engine="flat", optim=optim, ds_config=clipped, mesh=mesh))
    settings = Settings(size=32, micro_batches=micro_batches, deferred=micro_batches > 1)
    state = make_state(settings, *networks, mesh, steps=9)
    whole = rank_batch(make_batches(settings, torch.float32)[0], mesh)
    begin, end = (input_columns(32, width) or [(0, 32)])[mesh.width_index]
    own = {name: _pixels(getattr(whole, name)[..., begin:end]) for name in ("labelled", "weak", "strong")}
    runner = StepRunner(METHODS["mpl"].step, state, capture=False)
    batch = replace(whole, **own, normalise=Normalise(DataConfig(), device=mesh.device, dtype=torch.float32))
    for _ in range(2):
        runner(batch)
    before = live_storages()
    runner(batch)
    with HostReads() as counter:
        runner(batch)
    after = live_storages()
    return counter.seen, sum(before.values()), [size for address, size in after.items() if before.get(address) != size]


@pytest.mark.parametrize(
    ("world", "width", "micro_batches", "recompute"),
    [full(1, 1, 1, "none"), (1, 1, 2, "block"), full(2, 1, 1, "none"), full(2, 2, 1, "none"), (2, 2, 2, "bn_act")],
)
def test_nothing_is_allocated_for_good_after_the_second_step(
    world: int, width: int, micro_batches: int, recompute: str
) -> None:
    """A CUDA graph replays at fixed addresses: what is alive after a step stays where it was."""
    arguments = (width, micro_batches, recompute)
    results = pool(world).run(whole_step, *arguments) if world > 1 else [whole_step(*arguments)]
    for reads, alive, changed in results:
        assert not reads
        assert alive > 100_000
        assert not changed


def test_the_census_sees_a_planted_storage() -> None:
    before = live_storages()
    planted = torch.zeros(12345)
    changed = [size for address, size in live_storages().items() if before.get(address) != size]
    assert planted.untyped_storage().nbytes() in changed


def test_the_counter_sees_a_planted_read() -> None:
    with HostReads() as counter:
        torch.ones(()).item()
        torch.ones(3).nonzero()
    assert counter.seen == {"_local_scalar_dense": 1, "nonzero": 1}
