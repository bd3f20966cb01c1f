"""What a run writes: complete after a kill, continued exactly on resume, readable by people and by JSON."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mpl_scale.monitor import (
    MetricsWriter,
    Progress,
    Writers,
    config_hash,
    format_table,
    mark_done,
    read_metrics,
    versions,
    write_summary,
)
from mpl_scale.monitor.pace import Pace, format_seconds
from mpl_scale.trainer.prepare import SHOWN


def write_steps(path: Path, steps: range, *, resume_step: int | None) -> None:
    writer = MetricsWriter(path, resume_step=resume_step, clock=lambda: 5.0)
    for step in steps:
        phase, start = ("warmup", 0) if step <= 5 else ("train", 5)
        writer.write({"loss": 1 / step}, phase=phase, step=step - start, global_step=step)
    writer.close()


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole.jsonl", range(1, 21), resume_step=None)
    write_steps(tmp_path / "resumed.jsonl", range(1, 15), resume_step=None)
    with (tmp_path / "resumed.jsonl").open("a") as file:
        file.write('{"global_step": 15, "ph')  # the line a kill interrupted
    write_steps(tmp_path / "resumed.jsonl", range(9, 21), resume_step=8)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.jsonl", "whole.jsonl"]


def test_a_new_run_starts_an_empty_file_and_resuming_without_one_works(tmp_path: Path) -> None:
    path = tmp_path / "made" / "metrics.jsonl"
    write_steps(path, range(3, 5), resume_step=2)
    assert [line["global_step"] for line in read_metrics(path)] == [3, 4]
    write_steps(path, range(1, 2), resume_step=None)
    line = {"global_step": 1, "phase": "warmup", "step": 1, "part": "test", "wall": 5.0, "loss": 1.0}
    assert list(read_metrics(path)) == [line]
    assert list(read_metrics(tmp_path / "absent.jsonl")) == []


def test_each_line_is_strict_json_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, resume_step=None, clock=lambda: 1764000000.1234)
    values = {"h": float("nan"), "loss": float("inf"), "accuracy": 0.5}
    writer.write(values, phase="train", step=1, global_step=1)

    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(path.read_text(), parse_constant=no_constant)
    own = {"global_step": 1, "phase": "train", "step": 1, "part": "test", "wall": 1764000000.123}
    assert line == {**own, "h": None, "loss": None, "accuracy": 0.5}
    with pytest.raises(ValueError, match="global_step 0 comes after 1"):
        writer.write({}, phase="train", step=0, global_step=0)
    with pytest.raises(ValueError, match=r"\['step'\] name the line's own fields"):
        writer.write({"step": 3.0}, phase="train", step=2, global_step=2)


@pytest.mark.parametrize("text", ["{}\n", "[1]\n", '{"global_ste\n{"global_step": 2}\n', '{"global_step": "1"}\n'])
def test_a_foreign_line_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1}\n' + text)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: .* delete it"):
        MetricsWriter(tmp_path / "metrics.jsonl", resume_step=5)


def times(*seconds: float) -> Iterator[float]:
    return iter(seconds)


def test_lines_say_step_metrics_speed_and_time_left() -> None:
    stream, clock = io.StringIO(), times(0, 10, 14, 16)
    progress = Progress("auto", show=("loss", "h"), stream=stream, clock=lambda: next(clock))
    progress.start("train", total=100, done=20, images_per_step=64)
    progress.report({"h": 0.01234567, "loss": 2.0, "hidden": 1.0}, step=25)  # 0.5 step/s, 150 s left
    progress.report({"loss": float("nan")}, step=35)  # 2.5 step/s; the first 10 s (warm-up) no longer count
    progress.note("saved")
    progress.report({}, step=50)  # 7.5 step/s now, 25 steps in 6 s on average: 12 s left
    assert stream.getvalue().splitlines() == [
        "[train 25/100] loss 2 h 0.01235 32 img/s eta 2m30s",
        "[train 35/100] loss nan 160 img/s eta 26s",
        "saved",
        "[train 50/100] 480 img/s eta 12s",
    ]


def test_a_bar_on_a_terminal_and_nothing_when_off() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress("auto", show=("loss", "h"), stream=stream)
    progress.start("train", total=10, done=2, images_per_step=8)
    progress.report({"loss": 1.5}, step=4)
    progress.report({"h": 0.25}, step=6)
    progress.note("saved step 6")
    progress.close()
    last = stream.getvalue().replace("\r", "\n").rstrip().splitlines()[-1]
    assert re.search(r"^train 6/10 eta 0s \d+ img/s loss 1.5 h 0.25 \|", last)
    assert "saved step 6\n" in stream.getvalue()

    silent = Terminal()
    progress = Progress("off", show=("loss",), stream=silent)
    progress.start("train", total=10, done=0, images_per_step=8)
    progress.report({"loss": 1.5}, step=4)
    progress.note("saved step 4")
    progress.close()
    assert silent.getvalue() == ""


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    ("phase", "losses"),
    [
        ("train", {"student_loss": 1.23456, "teacher_supervised_loss": 0.0123456, "h": -1.5e-5, "cosine": 0.123}),
        ("teacher_warmup", {"teacher_supervised_loss": 0.123456, "teacher_uda_loss": 2.34567}),
    ],
)
def test_a_bar_keeps_speed_and_two_losses_whatever_was_evaluated(
    monkeypatch: pytest.MonkeyPatch, columns: int, phase: str, losses: dict[str, float]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    seconds, stream = iter([0.0, 10.0, 20.0, 620.0]), io.StringIO()
    progress = Progress("bar", show=SHOWN, stream=stream, clock=lambda: next(seconds))
    progress.start(phase, total=300_000, done=0, images_per_step=512)
    for step in (100, 200):
        progress.report(losses, step=step)
    top1 = {f"test/{name}_top1": 93.21 for name in ("student", "teacher", "ema")}
    progress.report({**top1, "test/student_loss": 9.0}, step=200)  # after ten minutes of evaluation
    progress.close()
    last = stream.getvalue().replace("\r", "\n").rstrip().splitlines()[-1]
    assert len(last) <= columns
    first, second = ("student 1.23", "teacher 0.0123") if phase == "train" else ("teacher 0.123", "teacher_uda 2.35")
    assert last.startswith(f"{phase} 200/300000 eta ")
    assert f" 5120 img/s {first} {second}" in last
    assert "9" not in last.partition(second)[2].replace("93.2", "")
    assert ("student_top1 93.2" in last) == (columns == 120)


def test_a_bar_tells_the_test_sets_loss_from_the_training_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    progress = Progress("bar", show=("student_loss", "test/student_loss"), stream=stream)
    progress.start("train", total=10, done=0, images_per_step=8)
    progress.report({"student_loss": 1.5}, step=2)
    progress.report({"test/student_loss": 2.5}, step=2)
    progress.close()
    assert "student 1.5 test/student 2.5" in stream.getvalue().replace("\r", "\n").rstrip().splitlines()[-1]


def test_pace_before_anything_is_measured() -> None:
    clock = times(0, 0, 0)
    pace = Pace(total=10, done=0, clock=lambda: next(clock))
    assert (pace.steps_per_second, pace.seconds_left) == (None, None)
    pace.report(0)
    assert (pace.steps_per_second, pace.seconds_left) == (None, None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (80, "1m20s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_seconds_as_words(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


class Monitor:
    """Records what DeepSpeed's MonitorMaster would be given."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.events: list[tuple[str, float, int]] = []

    def write_events(self, event_list: Sequence[tuple[str, float, int]]) -> None:
        self.events += event_list


def test_writers_reach_every_place(tmp_path: Path) -> None:
    stream, monitor, disabled = io.StringIO(), Monitor(enabled=True), Monitor(enabled=False)
    progress = Progress("lines", show=("loss",), stream=stream)
    progress.start("train", total=10, done=0, images_per_step=8)
    metrics = MetricsWriter(tmp_path / "metrics.jsonl", resume_step=None, clock=lambda: 5.0)
    writers = Writers(metrics, progress, monitor)
    for target in (writers, Writers(monitor=disabled), Writers()):
        target.write({"loss": 0.5, "images_per_second": 2.0}, phase="train", step=3, global_step=8)
        target.write({"loss": 0.7}, phase="train", step=3, global_step=8)
        target.note("a line")
        target.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [
        {
            "global_step": 8,
            "phase": "train",
            "step": 3,
            "part": "train",
            "wall": 5.0,
            "loss": 0.5,
            "images_per_second": 2.0,
        },
        {"global_step": 8, "phase": "train", "step": 3, "part": "test", "wall": 5.0, "loss": 0.7},
    ]
    assert stream.getvalue().startswith("[train 3/10] loss 0.5 ")
    assert "0.7" not in stream.getvalue()  # not among what is shown: the test loss is not the training loss
    assert stream.getvalue().endswith("\na line\n")
    assert monitor.events == [("train/loss", 0.5, 8), ("train/images_per_second", 2.0, 8), ("test/loss", 0.7, 8)]
    assert disabled.events == []


def test_summary_is_replaced_whole(tmp_path: Path) -> None:
    path = write_summary(tmp_path, {"b": 1, "a": {"accuracy": 0.5}})
    assert path.read_text() == '{\n  "a": {\n    "accuracy": 0.5\n  },\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match=r"summary.json: .*give finite numbers"):
        write_summary(tmp_path, {"a": float("nan")})
    assert json.loads(path.read_text())["b"] == 1
    mark_done(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["DONE", "summary.json"]


def test_versions_and_hash() -> None:
    import torch

    found = versions()
    assert (found["torch"] or "").split("+")[0] == torch.__version__.split("+")[0]  # some wheels leave the +cpu out
    assert set(found) == {"python", "torch", "deepspeed", "fairscale", "timm", "numpy", "nvidia-dali"}
    assert config_hash({"a": 1, "b": {"c": [1, 2], "d": None}}) == config_hash({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert re.fullmatch(r"[0-9a-f]{12}", config_hash({}))


def test_table_groups_runs_over_seeds() -> None:
    rows = [
        {"method": "mpl", "seed": 0, "accuracy": 0.90, "seconds": 10.0},
        {"method": "supervised", "seed": 0, "accuracy": 0.80, "seconds": None},
        {"method": "mpl", "seed": 1, "accuracy": 0.94, "seconds": 12.0},
    ]
    table = format_table(rows, by=("method",), columns={"accuracy": ".1%", "seconds": ".0f"})
    # sample deviations: |0.94 - 0.90| / sqrt(2) = 2.8%, |12 - 10| / sqrt(2) = 1.4
    assert table == (
        "| method     |     accuracy | seconds | runs |\n"
        "| ---------- | ------------ | ------- | ---- |\n"
        "| mpl        | 92.0% ± 2.8% |  11 ± 1 |    2 |\n"
        "| supervised |        80.0% |       - |    1 |\n"
    )
