"""The benchmark suite: run at toy size, its reference step against ours, and its documents against its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import collect, figure, index_build, preregistered, throughput
from benchmarks.kernel_classes import classify
from benchmarks.reference_step import ReferenceStep
from benchmarks.timing import PhaseTimer, interleave, ratios
from benchmarks.workload import make_workload
from mpl_scale.config import RunConfig
from mpl_scale.config.schema import Config
from mpl_scale.planner import count_macs

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def small(**parallel: object) -> RunConfig:
    network = {"name": "digits_cnn"}
    optim = {"name": "sgd", "lr": 0.05, "schedule": "constant", "weight_decay": 1e-4}
    section = {
        "model": {"teacher": network, "student": network, "num_classes": 10, "image_size": 8},
        "data": {"unlabelled_ratio": 3},
        "method": {"pseudo_labels": "argmax"},
        "optim": {"teacher": optim, "student": optim},
        "phases": {"train": {"steps": 100}},
        "parallel": {"engine": "flat", **parallel},
    }
    return RunConfig(path=Path("test"), mpl=Config.model_validate(section), deepspeed={"train_batch_size": 4})


def test_the_reference_computes_the_same_step() -> None:
    """From the same weights on the same batch; float32 over three steps."""
    load = make_workload(small(), device=CPU)
    reference = ReferenceStep(small(), device=CPU)
    assert load.state.teacher is not None
    assert load.state.student is not None
    networks = ((reference.teacher, load.state.teacher), (reference.student, load.state.student))
    for theirs, ours in networks:
        theirs.load_state_dict(ours.module.state_dict())
    reference._average = [value.detach().clone() for value in (*reference.student.parameters(), *_floats(reference))]
    batch = next(load.source)
    for _ in range(3):
        cosine = reference(batch)
        torch.testing.assert_close(load.step()["cosine"].float(), cosine, rtol=1e-3, atol=1e-4)
    for theirs, ours in networks:
        found = ours.module.state_dict()
        for name, value in theirs.state_dict().items():
            if "num_batches" not in name:  # ours does not count the feedback pass
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def _floats(reference: ReferenceStep) -> list[torch.Tensor]:
    return [buffer for buffer in reference.student.buffers() if buffer.is_floating_point()]


def test_phases_add_up_and_leave_the_state_as_it_was() -> None:
    load = make_workload(small(), device=CPU)
    networks = load.state.teacher, load.state.student
    found = throughput.phases(load, 3, device=CPU)
    assert (load.state.teacher, load.state.student) == networks
    parts = {name: value for name, value in found.items() if name != "step"}
    assert all(value > 0 for name, value in parts.items() if name != "input")
    timer = PhaseTimer(CPU)
    with timer.attached(load.state):
        timer.begin()
        load.phase.method.step(load.state, next(load.source))
        timer.mark("other")
    assert [phase for phase, _ in timer._marks if phase not in ("begin", "other")] == [
        "teacher_forward",
        "student_update",  # forward
        "student_update",  # accumulate
        "student_update",  # reduce
        "optimiser",
        "feedback",
        "feedback",
        "feedback",
        "feedback",  # discard
        "teacher_update",
        "teacher_update",
        "optimiser",
    ]


def test_flops_are_the_images_that_pass() -> None:
    """B = 4, U = 12: teacher 28 images, student 16 and 4 for the feedback; three forwards' worth, 2 a MAC."""
    load = make_workload(small(), device=CPU)
    assert load.state.student is not None
    macs = count_macs(load.state.student.module, 8)
    assert load.flops() == 2 * 3 * macs * (28 + 20)
    deferred = make_workload(small(teacher="deferred"), device=CPU)
    assert deferred.flops() == 2 * macs * (3 * (28 + 20) + 28)


@pytest.mark.usefixtures("one_process")
def test_throughput_compares_configurations_and_writes_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "t.json"
    config = ["--ds_config", str(ROOT / "ds_configs/digits.json"), "--set", "mpl_scale.parallel.engine=flat"]
    counts = ["--warmup", "1", "--rounds", "2", "--steps", "1", "--phase_steps", "1", "--output", str(output)]
    compare = ["--compare", "a:", "--compare", "b: --set mpl_scale.method.name=supervised"]
    assert throughput.main([*config, *counts, *compare]) == 0
    document = json.loads(output.read_text())
    a, b = document["configurations"]["a"], document["configurations"]["b"]
    assert (a["method"], b["method"]) == ("mpl", "supervised")
    assert len(a["seconds_per_step"]) == 2
    assert a["images_per_second"] == pytest.approx((40 + 120) / (a["ms_per_step"] / 1e3))
    assert a["mfu"] == pytest.approx(a["flops_per_step_and_rank"] / (a["ms_per_step"] / 1e3 * a["peak_tflops"] * 1e12))
    assert b["phases_ms"]["teacher_forward"] == 0 < a["phases_ms"]["teacher_forward"]
    assert document["ratios"]["a"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    options = throughput._parser().parse_args([*config, "--compare", "no colon"])
    with pytest.raises(ValueError, match="NAME: --set X=Y"):
        throughput.configurations(options)


def test_turns_alternate_and_ratios_are_taken_within_a_round() -> None:
    calls: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = interleave(steps, rounds=2, count=2, device=CPU)
    assert "".join(calls) == "aabbaabb"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
    assert ratios({"a": [1.0, 10.0], "b": [2.0, 30.0]})["b"] == {"median": 2.5, "min": 2.0, "max": 3.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution_and_matrix_product"),
        ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<5, float, int>", "depthwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimiser"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true>", "batch_norm"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "collectives"),
        ("Memcpy DtoD (Device -> Device)", "memcpy"),
    ],
)
def test_kernels_are_put_into_their_class(name: str, kind: str) -> None:
    assert classify(name) == kind


def test_the_performance_document_is_what_the_results_say() -> None:
    assert collect.main(["--check"]) == 0


def test_a_stale_document_and_a_broken_result_are_refused(tmp_path: Path) -> None:
    folder, document = tmp_path / "results" / "cpu", tmp_path / "performance.md"
    folder.mkdir(parents=True)
    result = {"command": "x --y", "commit": "abc", "machine": "m", "rows": []}
    (folder / "a.json").write_text(json.dumps(result))
    arguments = ["--results", str(tmp_path / "results"), "--document", str(document)]
    assert collect.main(arguments) == 0
    assert "| cpu/a.json | m | abc |" in document.read_text()
    assert collect.main([*arguments, "--check"]) == 0
    (folder / "a.json").write_text(json.dumps({**result, "commit": "def"}))
    assert collect.main([*arguments, "--check"]) == 1
    (folder / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        collect.main(arguments)


@pytest.mark.parametrize("results", ["digits_methods", "feedback_fashion_mnist"])
def test_results_are_drawn(results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "images" / "results.png"
    monkeypatch.setattr(sys, "argv", ["figure", str(RESULTS / f"{results}.json"), str(picture)])
    assert figure.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_feedback_figure_shows_the_primary_differences() -> None:
    document = json.loads((RESULTS / "feedback_fashion_mnist.json").read_text())
    axes = Figure().subplots()
    figure.draw_feedback(axes, [document])
    for container, pair in zip(axes.containers, preregistered.PRIMARY[::-1], strict=True):
        shown = container.lines[0].get_xdata()
        assert list(shown) == [task["paired"][pair]["mean"] for task in document["tasks"].values()]


@pytest.mark.parametrize("source", index_build.WRITERS)
def test_what_is_indexed_is_what_was_written(source: str, tmp_path: Path) -> None:
    index_build.WRITERS[source](tmp_path / "data", 250)
    found = index_build.measure(source, tmp_path / "data", workers=1)
    (row,) = collect.index_build_rows({"builds": [found]})
    assert (found["rows"], row["rows"], row["source"]) == (250, "250", source)
    assert found["processor_us_per_row"] > 0
