"""The planner: what fits, what is fastest and why, what the command prints, writes and refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from mpl_scale.cli.check import report
from mpl_scale.cli.main import main
from mpl_scale.config import check, load_config
from mpl_scale.config.schema import WeakConfig
from mpl_scale.mpl import METHODS
from mpl_scale.planner.duration import collective
from mpl_scale.planner.hardware import DEVICES, Reached, find_device, load_calibration
from mpl_scale.planner.job import Choice, Job, Machine
from mpl_scale.planner.memory import memory, resident_bytes
from mpl_scale.planner.reasons import reasons
from mpl_scale.planner.recorder import Line
from mpl_scale.planner.search import Plan, search, sweep
from mpl_scale.trainer.planning import main_job, make_jobs, make_machine
from tests.support.configs import DIGITS, tiny, write

FOLDER = DIGITS.parent
H200 = Machine(DEVICES["h200"], Reached())


def job(folder: Path, *, labelled: int = 64, image_size: int = 64, **top_level: object) -> Job:
    """A small EfficientNet on both sides, bf16."""
    raw = tiny(train_batch_size=labelled, bf16={"enabled": True}, **top_level)
    raw.pop("train_micro_batch_size_per_gpu", None)
    network = {"name": "test_efficientnet"}
    raw["mpl_scale"]["model"] |= {"teacher": network, "student": network, "image_size": image_size}
    run = load_config(write(folder, raw))
    batches = check(run, world=1, cuda=True)
    return main_job(make_jobs(run, batches, kernels="compiled"))


def small(machine: Machine, gigabytes: float) -> Machine:
    """The same with less memory and no allowance for a driver."""
    device = dataclasses.replace(machine.device, memory=gigabytes * 1e9)
    return Machine(device, dataclasses.replace(machine.reached, runtime=0.0))


def test_every_fitting_plan_is_in_order_and_none_that_does_not_fit(tmp_path: Path) -> None:
    found = search(job(tmp_path), 4, H200)
    assert found.fitting
    assert all(plan.memory.total <= H200.device.memory for plan in found.fitting)
    times = [plan.duration.total for plan in found.fitting]
    assert all(later >= 0.995 * earlier for earlier, later in itertools.pairwise(times))  # 3 digits decide
    assert {plan.choice.width for plan in found.plans} == {1, 2, 4}
    assert all(plan.choice.data * plan.choice.parts * plan.choice.labelled == plan.job.labelled for plan in found.plans)


def test_less_memory_means_more_recomputation_a_deferred_teacher_or_smaller_parts_with_the_reason(
    tmp_path: Path,
) -> None:
    planned = job(tmp_path)
    roomy = search(planned, 1, small(H200, 141)).fitting[0]
    assert (roomy.choice.recompute, roomy.choice.deferred, roomy.choice.parts) == ("none", False, 1)
    tight = small(H200, 0.25 * roomy.memory.total / 1e9)
    found = search(planned, 1, tight)
    best = found.fitting[0]
    assert best.memory.total <= tight.device.memory < roomy.memory.total
    assert best.duration.device > roomy.duration.device
    assert (best.choice.recompute, best.choice.deferred, best.choice.parts) != ("none", False, 1)
    said = "\n".join(reasons(best, found))
    assert "even the smallest takes" in said
    assert f"the device has {tight.device.memory / 1e9:.0f} GB" in said


def test_every_rejection_has_its_reason(tmp_path: Path) -> None:
    """64 labelled images over 128 ranks: whole images cannot be, and the line says by which division."""
    found = search(job(tmp_path), 128, H200)
    assert found.refused["width 1"] == ("train_batch_size 64 does not divide over 128 data ranks (= 128 ranks / 1)")
    best = found.fitting[0]
    assert best.choice.width > 1
    said = reasons(best, found)
    assert any("not 1: train_batch_size 64 does not divide" in line for line in said)
    for axis in ("width", "recompute", "teacher", "ZeRO", "micro-batch"):
        assert any(line.startswith(f"{axis} ") for line in said)


def test_shards_shrink_the_state_and_a_width_shrinks_the_activations(tmp_path: Path) -> None:
    planned = job(tmp_path)
    whole = Choice(8, 1, 0, 1, "flat", "none", False, 8, 1)
    shard = dataclasses.replace(whole, stage=2, shard_size=8)
    split = dataclasses.replace(whole, width=4, labelled=32)
    before, sharded, halved = (memory(planned, choice, H200).categories for choice in (whole, shard, split))
    # a shard of 8, to a padded element
    assert sharded["optimizer"] == pytest.approx(before["optimizer"] / 8, rel=1e-3)
    assert sharded["weights"] == before["weights"]
    # a quarter of the columns of four times the images, and the columns that neighbours lend
    assert 1.0 < halved["activations"] / before["activations"] < 1.5


def test_a_live_teacher_keeps_every_micro_batch_and_a_deferred_one_its_own(tmp_path: Path) -> None:
    planned = job(tmp_path)
    parts = Choice(1, 1, 0, 1, "flat", "none", True, 8, 8)
    whole = dataclasses.replace(parts, labelled=64, parts=1)

    def kept(choice: Choice) -> float:
        return memory(planned, choice, H200).categories["activations"]

    assert kept(parts) == pytest.approx(kept(whole) / 8, rel=0.01)  # but for the statistics of a pass
    assert kept(dataclasses.replace(parts, deferred=False)) > 0.5 * kept(dataclasses.replace(whole, deferred=False))


def test_resident_images_are_counted_where_they_may_stay(tmp_path: Path) -> None:
    config = job(tmp_path).config

    def counted(image_size: int = 64, **data: object) -> float:
        model = config.model.model_copy(update={"image_size": image_size})
        changed = {"model": model, "data": config.data.model_copy(update=data)}
        return resident_bytes(config.model_copy(update=changed))

    choice = Choice(1, 1, 0, 1, "flat", "none", True, 64, 1)
    assert memory(job(tmp_path), choice, H200).categories["resident"] == counted() > 0
    assert counted(weak=WeakConfig()) == 1797 * 3 * 64**2
    assert counted(weak=WeakConfig(), source="folder") == 1 << 31  # as many as there may be
    assert counted(resident="off") == counted(weak=WeakConfig(kind="random_resized_crop")) == counted(97) == 0
    assert counted(97, resident="on", resident_bytes=1000) == 1000


def test_the_buffers_of_a_loss_are_counted(tmp_path: Path) -> None:
    """A status of 4 bytes for each digit and one more; averages of 10 classes, twice where steps can be skipped."""
    planned = job(tmp_path)

    def counted(loss: str, *, nonfinite: str = "stop") -> float | None:
        settings = planned.settings.model_copy(update={"teacher_loss": loss})
        guard = planned.config.guard.model_copy(update={"nonfinite": nonfinite})
        config = planned.config.model_copy(update={"guard": guard})
        choice = Choice(1, 1, 0, 1, "flat", "none", True, 64, 1)
        found = memory(dataclasses.replace(planned, settings=settings, config=config), choice, H200)
        assert found.static >= found.categories.get("loss_buffers", 0)
        return found.categories.get("loss_buffers")

    assert counted("uda") is None
    assert counted("flexmatch") == 4 * (1797 + 1)
    assert counted("freematch") == 8 * 21
    assert counted("softmatch", nonfinite="skip") == 2 * 8 * 12


def test_a_loss_that_adapts_takes_another_forward_of_each_micro_batch(tmp_path: Path) -> None:
    """Of a baseline; MPL's deferred teacher sees them all before."""
    planned = job(tmp_path)

    def forwards(method: str, parts: int) -> list[int]:
        one = dataclasses.replace(planned, method=METHODS[method])
        choice = Choice(1, 1, 0, 1, "flat", "none", True, planned.labelled // parts, parts)
        return [a_pass.forward for a_pass in one.passes(choice)]

    assert forwards("freematch", 1) == forwards("fixmatch", 2) == [1]
    assert forwards("freematch", 2) == [2]


def test_batches_are_bytes_and_micro_batches_what_networks_are_given(tmp_path: Path) -> None:
    planned = job(tmp_path)
    pixels, given = 3 * 64 * 64, 3 * 64 * 64 * (4 + 2)  # fp32, and bf16 of it
    labelled, unlabelled = planned.labelled, planned.unlabelled
    batches, views = 3 * (labelled + 2 * unlabelled), labelled + 2 * unlabelled
    seen = unlabelled + labelled * planned.settings.student_sees_labelled

    def images(parts: int, *, deferred: bool) -> float:
        choice = Choice(1, 1, 0, 1, "flat", "none", deferred, labelled // parts, parts)
        return memory(planned, choice, H200).categories["images"]

    assert images(1, deferred=True) == batches * pixels + views * given
    assert images(4, deferred=True) == batches * pixels + views * given / 4
    assert images(4, deferred=False) == batches * pixels + (views + seen / 4) * given


def test_collectives_cost_latency_then_bytes_and_more_over_the_network() -> None:
    def seconds(size: float, ranks: int, operation: str = "all_reduce") -> float:
        return collective(operation, size, ranks=ranks, spread=ranks, machine=H200)

    assert seconds(1e9, 1) == 0.0
    assert seconds(8, 16) > seconds(8, 8) > seconds(8, 2) > 0.0
    rate = H200.device.link * H200.reached.link
    assert seconds(1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / rate, rel=0.01)  # the latency of 1 GB is below 1%
    assert seconds(1e9, 8, "all_gather") == pytest.approx(seconds(1e9, 8) / 2, rel=0.01)
    assert seconds(1e9, 16, "all_to_all") > 5 * seconds(1e9, 8, "all_to_all")  # one adapter instead of the links


def test_a_line_adds_and_scales() -> None:
    line = Line(2.0, 6.0)
    assert line.at(3) == 20.0
    assert line.per(3) == Line(2.0, 2.0)
    assert line + line - line == line


def test_the_sweep_says_where_only_a_split_can_be(tmp_path: Path) -> None:
    from mpl_scale.planner.scaling import efficiency, lines, plot

    found = sweep(job(tmp_path), [16, 128], H200)
    assert found[16][0] is not None
    assert found[128][0] is None
    assert found[128][1] is not None
    assert lines(found)[-1] == "only a width partition fits at 128 devices"
    assert max(share for pair in efficiency(found).values() for share in pair if share is not None) == 1.0
    for name in ("curve.png", "curve.svg"):
        plot(found, tmp_path / name, title="a sweep")
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot(found, tmp_path / "curve.txt", title="")


def test_the_written_config_passes_check_with_the_planned_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tiny(train_batch_size=32)
    raw.pop("train_micro_batch_size_per_gpu", None)
    raw["mpl_scale"]["phases"]["finetune"]["batch_size"] = 32
    source, written = write(tmp_path, raw), str(tmp_path / "planned.json")
    assert main(["plan", "--ds_config", source, "--gpus", "4", "--gpu", "cpu", "--output", written]) == 0
    said = capsys.readouterr().out
    for part in ("plan", "GB a rank", "ms a step", "why:", "days", "device-hours", "student_update", "fragmentation"):
        assert part in said
    total = next(line.split()[1] for line in said.splitlines() if line.strip().startswith("total"))
    lines = report(load_config(written), world=4, cuda=False, gpu="cpu")
    phase = next(line for line in lines if line.startswith("phase train"))
    assert f": {float(total):.2f} GB per rank" in phase
    assert json.loads(Path(written).read_text())["train_batch_size"] == 32


def test_check_refuses_what_cannot_fit_and_names_what_would(tmp_path: Path) -> None:
    """A device of 3 GB, 2 of them the driver's: 64 images of 64 x 64 whole and kept do not fit, smaller parts do."""
    device = tmp_path / "tiny_gpu.json"
    device.write_text(json.dumps({"like": "v100-16", "memory": 3.0e9}))
    raw = tiny(train_batch_size=64)
    raw.pop("train_micro_batch_size_per_gpu", None)
    network = {"name": "wide_resnet28_2"}
    raw["mpl_scale"]["model"] |= {"teacher": network, "student": network, "image_size": 64}
    raw["mpl_scale"]["phases"]["finetune"]["batch_size"] = 64
    run = load_config(write(tmp_path, raw))
    with pytest.raises(ValueError, match=r"cannot fit: it takes .* activations.*this would, .* GB") as error:
        report(run, world=1, cuda=True, gpu=str(device))
    assert "micro-batch" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h300"], "did you mean h200"),
        (["--gpus", "8", "--nodes", "3"], "--nodes 3 does not divide --gpus 8"),
        (["--plot", "x.png"], "add --sweep"),
        (["--sweep", "16", "8"], "give the smaller number first"),
        (["--calibration", "none.json"], "--calibration none.json: cannot be read"),
        (["--set", "train_batch_size=0"], "at least 1"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ds_config", str(DIGITS), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_device_of_ones_own_and_a_calibration(tmp_path: Path) -> None:
    own = tmp_path / "b.json"
    own.write_text(json.dumps({"like": "h200", "memory": 192e9}))
    device = find_device(str(own), ranks_per_node=4)
    assert (device.memory, device.per_node, device.peak) == (192e9, 4, DEVICES["h200"].peak)
    own.write_text(json.dumps({"like": "h200", "memori": 1}))
    with pytest.raises(ValueError, match="did you mean memory"):
        find_device(str(own))
    own.write_text(json.dumps({"like": "h200", "memory": -1}))
    with pytest.raises(ValueError, match="above 0"):
        find_device(str(own))
    measured = tmp_path / "c.json"
    measured.write_text(
        json.dumps({"device": {"peak": 5e11}, "reached": {"launch": 1e-5, "arithmetic": {"dense": 0.9}}})
    )
    device, reached = load_calibration(measured, DEVICES["h200"])
    assert (device.peak, reached.launch, reached.arithmetic["dense"]) == (5e11, 1e-5, 0.9)
    assert reached.arithmetic["linear"] == Reached().arithmetic["linear"]
    assert reached.source == str(measured)


def test_the_papers_run_is_possible_in_one_reading_of_its_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Section 4: 11 days; 2,048 + 16,384 images over all replicas are below a TPU core's peak, in each replica not."""
    assert main(["plan", "--ds_config", str(FOLDER / "l2.json"), "--paper"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "11.0 days" in said[0]
    assert said[-2].endswith("possible")
    assert "over all replicas" in said[-2]
    assert said[-1].endswith("impossible")


def test_machine_of_the_cpu_has_no_graph_and_no_driver() -> None:
    machine = make_machine("cpu", per_node=2)
    assert machine.device.cpu
    assert machine.reached.runtime < Reached().runtime


def test_plans_know_their_length(tmp_path: Path) -> None:
    planned = dataclasses.replace(job(tmp_path), steps=86_400)
    plan = Plan(planned, Choice(8, 1, 2, 8, "flat", "none", False, 8, 1), H200)
    assert plan.days == pytest.approx(plan.duration.total)  # a day has as many seconds as the phase steps
    assert plan.device_hours == pytest.approx(8 * 24 * plan.days)
