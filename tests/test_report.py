"""mpl-scale report: what the page says is what the runs ended with, and it stands alone."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpl_scale.cli import main
from mpl_scale.config import load_config
from mpl_scale.report.build import read
from mpl_scale.report.curves import shown_groups
from mpl_scale.report.drawing import DARK, LIGHT, render
from mpl_scale.report.figures import FIGURES
from mpl_scale.report.material import Curve, Material
from mpl_scale.report.page import make_page
from mpl_scale.report.runs import EVALUATION, differing
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import DIGITS, tiny, write
from tests.support.report_page import RULE, Page, material_of, trial

ROOT = DIGITS.parents[1]
CPU = ROOT / "benchmarks" / "results" / "cpu"
RUNS = {
    "supervised/seed_0": ["mpl_scale.method.name=supervised", "mpl_scale.phases.finetune.steps=0"],
    "supervised/seed_1": ["mpl_scale.method.name=supervised", "mpl_scale.phases.finetune.steps=0", "mpl_scale.seed=1"],
    "mpl/seed_0": [],
    "none/seed_0": ["mpl_scale.method.feedback.rule=none"],
    "mpl_5/seed_0": ["mpl_scale.data.labelled_per_class=5"],
}
COSINE, NONE = "mpl, feedback.rule cosine", "mpl, feedback.rule none"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    raw = tiny()
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["checkpoint"] = {"every": 0}
    section["phases"] = {"train": {"steps": 4, "evaluate_every": 2}, "finetune": {"steps": 2, "optim": {"lr": 0.002}}}
    config = write(folder, raw, "tiny.json")
    for name, overrides in RUNS.items():
        assert train(load_config(config, overrides=overrides), Options(folder / name)) is not None
    return folder


def top1(folder: Path, network: str) -> float:
    return float(json.loads((folder / "summary.json").read_text())["results"][network]["top1"])


def test_the_page_says_what_the_runs_ended_with_and_stands_alone(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "page.html"
    assert main(["report", str(runs), "--output", str(output), "--title", "A & B"]) == 0
    text = output.read_text()
    page = Page(text)
    assert "<title>A &amp; B</title>" in text
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in page.addresses)
    assert re.search(r"url\(|@import", text) is None

    rows = {tuple(row[:2]): row[2:] for row in page.tables["runs"]}
    assert rows["configuration", "labels a class"] == ["student", "its average (EMA)", "finetuned", "teacher", "runs"]
    both = [top1(runs / "supervised" / f"seed_{seed}", "student") for seed in (0, 1)]
    assert (rows["supervised", "4"][0], rows["supervised", "4"][2:]) == (spread(both), ["", "", "2"])
    for label, labels, name in ((COSINE, "4", "mpl"), (NONE, "4", "none"), (COSINE, "5", "mpl_5")):
        folder = runs / name / "seed_0"
        assert rows[label, labels][2] == f"{top1(folder, 'finetuned'):.2f}"
        assert rows[label, labels][3:] == [f"{top1(folder, 'teacher'):.2f}", "1"]
    assert f"control.</strong> {COSINE} (5 labels a class): no runs with feedback.rule none" in text

    pictures = {path.name for path in output.parent.glob("*.png")}
    assert pictures == {f"page-{name}.png" for name in ("breakdown", "training-accuracy", "labels", "curves", "speed")}
    for name in pictures:
        with Image.open(output.parent / name) as picture:
            assert len(set(picture.convert("L").resize((64, 64)).get_flattened_data())) > 10  # not empty paper

    differences = {row[0] for row in page.tables["What differs between the configurations"]}
    assert differences == {
        "field",
        "mpl_scale.data.labelled_per_class",
        "mpl_scale.method.feedback.rule",
        "mpl_scale.method.name",
        "mpl_scale.phases.finetune.steps",
        "steps trained",
    }
    origins = page.tables["Runs"]
    assert {row[origins[0].index("test images")] for row in origins[1:]} == {"599"}
    assert all(" cores of " in row[origins[0].index("processor")] for row in origins[1:])


def test_runs_that_differ_in_their_seed_alone_are_a_group(runs: Path) -> None:
    material = read([runs])
    assert [(group.label, group.labels, list(group.seeds)) for group in material.groups] == [
        (COSINE, 4.0, [0]),
        (NONE, 4.0, [0]),
        ("supervised", 4.0, [0, 1]),
        (COSINE, 5.0, [0]),
    ]
    assert read([runs / "mpl" / "seed_0", runs]).groups[0].seeds == [0]  # given twice, counted once


def test_a_training_loss_is_not_an_evaluation_s(runs: Path) -> None:
    """Both are called student_loss in metrics.jsonl."""
    lines = [json.loads(line) for line in (runs / "mpl/seed_0/metrics.jsonl").read_text().splitlines()]
    group = read([runs / "mpl" / "seed_0"]).groups[0]
    for name, chosen in (
        ("student_loss", [line for line in lines if line["part"] == "train"]),
        (f"{EVALUATION}student_loss", [line for line in lines if line["part"] == "test" and "student_loss" in line]),
    ):
        curve = group.curves[name]
        key = name.removeprefix(EVALUATION)
        assert dict(zip(curve.steps, curve.mean, strict=True)) == {line["global_step"]: line[key] for line in chosen}


def test_a_curve_is_of_the_steps_that_all_runs_have() -> None:
    curve = Curve.over_runs([{10: 1.0, 20: 2.0, 30: 9.0}, {10: 3.0, 20: 2.0}])
    assert (curve.steps, curve.mean, curve.deviation) == ([10, 20], [2.0, 2.0], [statistics.stdev([1.0, 3.0]), 0.0])


def test_many_configurations_are_named_by_their_folders_and_the_best_are_drawn() -> None:
    fields = ("optim__student__lr", "optim__student__weight_decay", "method__uda__temperature")
    runs = [trial(f"s/trial_{i:03d}", x=0, **dict.fromkeys(fields, i)) for i in range(12)]
    runs += [trial(f"s/final_011_seed_{seed}", seed=seed, x=1, **dict.fromkeys(fields, 11)) for seed in (1, 2)]
    runs.append(trial("s/plain/seed_3", method__name="supervised"))
    material = material_of(runs)
    labels = [group.label for group in material.groups]
    assert labels == [*(f"mpl (trial_{i:03d})" for i in range(12)), "mpl (final_011)", "supervised"]
    best = ["mpl (trial_009)", "mpl (trial_010)", "mpl (trial_011)", "mpl (final_011)"]
    assert [group.label for group in shown_groups(material)][-4:] == best  # supervised ended with 0
    assert len(shown_groups(material)) == 8
    (figure,) = FIGURES["training_accuracy"](material)
    shown = figure.alt.removeprefix("Training accuracy over steps of ").split(", ")
    assert len(shown) == 4
    assert {"supervised", "mpl (trial_011): student", "mpl (final_011): student"} < set(shown)


def test_rows_of_unequal_steps_are_flagged() -> None:
    runs = [trial("a", steps=120), trial("b", steps=60, method__name="uda")]
    said = "These rows were trained for unequal numbers of steps</strong> (all phases): 60 steps: uda; 120 steps: mpl."
    for shown, expected in ((runs, True), (runs[:1], False)):
        assert (said in make_page(material_of(shown), [], title="runs")) == expected


def test_a_label_says_what_differs() -> None:
    runs = [trial(rule, **{RULE: rule}) for rule in ("none", "cosine")]
    material = material_of([*runs, trial("c", method__name="uda")])
    assert [group.label for group in material.groups] == ["mpl, feedback.rule none", "mpl, feedback.rule cosine", "uda"]
    assert FIGURES["breakdown"](material) == FIGURES["labels"](material) == []  # nothing to compare


def test_a_run_that_goes_on_is_shown_as_such(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "mpl" / "seed_0", tmp_path / "half")
    for name in ("summary.json", "DONE"):
        (tmp_path / "half" / name).unlink()
    with (tmp_path / "half" / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 99, "ph')  # a line that is being written
    material = read([tmp_path / "half"])
    assert material.outcomes == []
    assert material.origins[0].facts["state"] == "not finished"
    assert "student_loss" in material.groups[0].curves


def spread(values: list[float]) -> str:
    """As a table shows them."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def drawn(material: Material) -> list[str]:
    return [plot.name for make in FIGURES.values() for plot in make(material)]


def test_the_benchmarks_files_give_the_figures_of_the_paper() -> None:
    names = ("digits_methods", "digits_table", "two_moons", "feedback")
    documents = {name: json.loads((CPU / f"{name}.json").read_text()) for name in names}
    material = read([*(CPU / f"{name}.json" for name in names), ROOT / "docs" / "images" / "two_moons.png"])
    wanted = [
        "breakdown",
        "training-accuracy",
        *(["labels-digits_table"] if len(documents["digits_table"]["labels"]) > 1 else []),
    ]
    assert drawn(material) == [*wanted, "two-moons", *(f"differences-{name}" for name in names[1:])]

    tables = Page(make_page(material, [], title="t")).tables
    rows = documents["digits_methods"]["rows"]
    bars_of = {"MPL with h = 0": "mpl_no_feedback", "MPL": "mpl", "+ finetuning": "mpl+finetune"}
    values = {name: [row["top-1"] for row in rows if row["method"] == name] for name in bars_of.values()}
    (mpl,) = (row for row in tables["digits_methods.json"] if row[0] == "mpl")
    assert [mpl[1], mpl[3], mpl[4]] == [spread(values["mpl"]), spread(values["mpl+finetune"]), "5"]
    (bars,) = FIGURES["breakdown"](material)
    means = [
        f"{stage} {statistics.fmean(values[name]):.1f}%"
        for stage, name in (("MPL with h = 0", "mpl_no_feedback"), ("MPL", "mpl"))
    ]
    assert ", ".join(means) in bars.alt
    for labels, part in documents["digits_table"]["labels"].items():
        (row,) = (row for row in tables["digits_table.json"] if row[:2] == ["reduced mpl", labels])
        assert row[4] == spread([run["finetuned_top1"] for run in part["runs"]["reduced mpl"]])
    (exact,) = (row for row in tables["feedback.json, up to 20 seeds"] if row[0] == "soft_exact")
    settings = documents["feedback"]["settings"].values()
    assert exact[1:] == [spread(setting["student_top1"]["soft_exact"]) for setting in settings]
    assert material.moons[0].success["mpl"] == documents["two_moons"]["tables"]["methods"]["rows"]["mpl"]["success"]

    plot = FIGURES["two_moons"](material)[0]
    files = render(plot)
    assert files == render(plot)  # the same data, the same bytes
    for ours, theirs in ((LIGHT.face, DARK.face), (LIGHT.text, DARK.text), (LIGHT.faint, DARK.faint)):
        assert files.light.count(ours.encode()) == files.dark.count(theirs.encode()) > 0
        assert ours.encode() not in files.dark


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "gone: no such file or folder; give"),
        ("empty/x.txt", "", "empty: no config.json and metrics.jsonl there or below"),
        ("notes.txt", "", "notes.txt: neither a folder nor .json nor .png"),
        ("a.json", "{", "a.json: cannot be read as JSON"),
        ("a.json", "[1]", "a.json: a JSON object is expected, not a list"),
        (
            "a.json",
            '{"kind": "feedbck"}',
            "kind = 'feedbck' is no benchmark that a report shows; did you mean feedback",
        ),
        ("a.json", '{"kind": "two_moons", "tables": {"t": {}}}', "not what benchmark two_moons writes (KeyError"),
        ("a.png", "GIF89a", "a.png: not a PNG file"),
        ("run/config.json", "{}", "config.json: no mpl_scale.seed"),
        ("run/config.json", "{'", "config.json: cannot be read as JSON"),
        ("run/metrics.jsonl", None, "metrics.jsonl: no such file; the run has not begun"),
        ("run/metrics.jsonl", "nonsense\n", "metrics.jsonl, line 1: 'nonsense' is not a line of metrics"),
        ("run/metrics.jsonl", '{"global_step": 1, "h": "x"}\n', "metrics.jsonl, line 1: h = 'x' is no value of it"),
        ("run/metrics.jsonl", '{"global_step": 1, "h": NaN}\n', "metrics.jsonl, line 1: h = 'nan' is no value of it"),
        ("run/metrics.jsonl", '{"global_step": 1, "step": "1"}\n', "line 1: step = '1' is no value of it"),
        ("run/summary.json", "{", "summary.json: cannot be read as JSON"),
        ("run/summary.json", '{"steps": 1}', "summary.json: no 'results'"),
        (
            "run/summary.json",
            '{"steps": 1, "results": {"student": 3}}',
            "run: summary.json, metrics.jsonl or splits/man",
        ),
        ("run/metrics.jsonl", '{"global_step": 1}\n', "is not what train.py writes (KeyError: 'phase')"),
        (
            "run/splits/manifest.json",
            '{"parts": {}, "classes": 10}',
            "is not what train.py writes (KeyError: 'labelled')",
        ),
        ("run/summary.json", '{"steps": 1, "results": []}', "summary.json: 'results' is a list"),
    ],
)
def test_bad_input_is_one_line_that_names_the_file(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if name.startswith("run/"):
        shutil.copytree(runs / "mpl" / "seed_0", tmp_path / "run")
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(content)
    output = tmp_path / "out" / "page.html"
    given = tmp_path / Path(name).parts[0]
    assert main(["report", str(given), "--output", str(output)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line, line
    assert not output.parent.exists()


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(CPU / "two_moons.json")]) == 2
    assert "pip install matplotlib" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ([{"a": 1}, {"a": 1}], []),
        ([{"a": 1, "b": [1]}, {"a": 2, "b": [1]}], ["a"]),
        ([{"a": None}, {}], ["a"]),
        ([{"a": 1}, {"a": 1.5}, {"a": 1}], ["a"]),
    ],
)
def test_fields_that_differ(settings: list[dict[str, Any]], fields: list[str]) -> None:
    assert differing(settings) == fields
