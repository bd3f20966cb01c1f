"""Every file of ds_configs: valid at the world it is meant for, built at full size, and trained for 20 steps."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpl_scale.cli.check import report
from mpl_scale.cli.main import main
from mpl_scale.config import RunConfig, check, load_config
from mpl_scale.config.schema import OptimConfig
from mpl_scale.data.index.build import build_index
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.vectors import LENGTHS
from mpl_scale.mpl import METHODS
from mpl_scale.optim.lars import LARS
from mpl_scale.optim.optimizers import OPTIMIZERS
from mpl_scale.trainer.phases import plan_phases
from mpl_scale.trainer.preflight import check_names
from mpl_scale.trainer.prepare import Options, train
from tests.support import mini_imagenet as mini
from tests.support.configs import DIGITS, tiny, write
from tests.support.image_sets import split
from tests.support.ranks import pool
from tests.support.tiers import full

FOLDER = DIGITS.parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
BASELINE = (
    *("supervised", "pseudo_label", "uda", "label_smoothing", "mpl_regularizer", "randaugment", "full"),
    *("noisy_student", "reduced_mpl", "b7_reduced"),
)
TRAINED = [name for name in NAMES if not name.endswith("gpu") and ("cifar" in name or not name.endswith(BASELINE))]
"""Each kind of run once; the variants for other data sets and numbers of GPUs as well with MPL_SCALE_TEST_ALL=1."""
REPEATED = ("svhn_1k", "imagenet_jft_resnet50", "cifar10_4k_mpl_randaugment", "cifar10_4k_supervised")
REPEATED += ("cifar10_supervised_full", "cifar10_4k_randaugment", "cifar10_4k_mpl_mixup", "cifar10_4k_mpl_pseudo_label")
REPEATED += (
    "cifar10_4k_mixup",
    "cifar10_4k_mpl_regularizer",
    "cifar10_4k_uda",
    "cifar10_noisy_student",
    "cifar10_reduced_mpl",
)  # test_trainer.py trains them
"""Methods that `make test` trains in another one, here on other data, with another view or both at once."""
LARGE = ("l2", "b6_wide")
"""Take minutes even at toy size."""
WORLDS = {"l2": 2048, "b6_wide": 2048, "imagenet_jft_resnet50": 512}
WORLDS |= dict.fromkeys(("imagenet_jft_resnet50_uda", "imagenet_jft_resnet50_noisy_student"), 512)
WORLDS |= {"b7_supervised": 128, "b7_noisy_student": 128, "b7_reduced": 128}
"""Ranks of the paper; "_8gpu" says it itself."""
STEPS = 20


def config(name: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    return load_config(FOLDER / f"{name}.json", overrides=overrides)


def intended_world(name: str) -> int:
    last = name.rpartition("_")[2]
    if last.endswith("gpu"):
        return int(last.removesuffix("gpu"))
    return WORLDS.get(name, 128 if name.startswith("imagenet") else 1)


def network_key(name: str) -> str:
    """What decides how the networks are built: configs that agree in it have the same ones."""
    run = config(name)
    model, parallel = run.mpl.model, run.mpl.parallel
    networks = [network.model_dump(exclude={"dropout"}) for network in (model.teacher, model.student)]
    shared = [model.image_size, model.num_classes, parallel.width, parallel.recompute, run.deepspeed.get("bf16")]
    return json.dumps([networks, shared])


def marked(name: str, *more: str) -> object:
    """The largest networks, and what repeats another one's proof, are for `make test-full`."""
    return full(name) if name in (*LARGE, *more) else name


FIRST_OF_ITS_KIND = sorted({network_key(name): name for name in reversed(NAMES)}.values())


@pytest.mark.parametrize("name", NAMES)
def test_valid_at_the_world_it_is_meant_for(name: str) -> None:
    run = config(name)
    batches = check(run, world=intended_world(name), cuda=True)
    check_names(run)
    phases = plan_phases(run.mpl, batches, max_steps=None)
    assert sum(phase.steps for phase in phases) >= run.mpl.phases.train.steps
    assert run.mpl.paper is not None
    # none: not in the paper
    assert run.mpl.paper.startswith(("Table", "Figure", "Pseudo", "Section", "Appendix", "none: "))


@pytest.mark.parametrize(
    "name", [marked(name, "l2_128gpu", "b6_wide_128gpu", "b7_reduced") for name in FIRST_OF_ITS_KIND]
)
def test_builds_and_is_planned_at_full_size(name: str) -> None:
    """One config of each kind of networks; the others have the same ones (network_key)."""
    lines = report(config(name), world=intended_world(name), cuda=True)
    said = "\n".join(lines)
    assert all(word in said for word in ("train_batch_size", "teacher: ", "student: ", "GMAC", "phase train", "GB per"))
    gigabytes = [float(line.split(" GB per rank")[0].rpartition(" ")[2]) for line in lines if "GB per rank" in line]
    assert all(0 <= size < 141 for size in gigabytes), said  # an H200's


@pytest.mark.parametrize(
    ("name", "labelled", "unlabelled", "facts"),
    [
        ("cifar10_4k", 128, 128, ["1.5 M parameters", "1000000 steps", "phase finetune (supervised, 1000 steps, 512"]),
        ("imagenet_jft_resnet50", 4096, 32768, ["25.6 M parameters", "4.09 GMAC", "500000 steps", "10000 steps"]),
    ],
)
def test_the_papers_numbers_are_printed(
    capsys: pytest.CaptureFixture[str], name: str, labelled: int, unlabelled: int, facts: list[str]
) -> None:
    assert main(["check", "--ds_config", str(FOLDER / f"{name}.json"), "--world", str(intended_world(name))]) == 0
    said = capsys.readouterr().out
    assert f"train_batch_size {labelled} = " in said
    assert f"unlabelled {unlabelled}\n" in said
    for fact in facts:
        assert fact in said


def test_l2_finetunes_with_lars() -> None:
    """Section 4 and C.4: 20,000 steps of 4,096 images, LARS with lr 0.001 and momentum 0.9, trust by its default."""
    run = config("l2")
    phase = plan_phases(run.mpl, check(run, world=2048, cuda=True), max_steps=None)[-1]
    optim = phase.optim.student
    assert (phase.name, phase.steps, phase.labelled, OPTIMIZERS[optim.name]) == ("finetune", 20_000, 4096, LARS)
    assert (optim.lr, optim.momentum, optim.trust, optim.schedule) == (0.001, 0.9, 0.001, "constant")


def test_an_unknown_finetune_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match=r"phases.finetune.optim.name = 'larss' is unknown; did you mean lars"):
        check_names(config("l2", ("mpl_scale.phases.finetune.optim.name=larss",)))


# ---- 20 real steps


def reduced(name: str) -> tuple[str, ...]:
    """Digits for the data, a network of a few channels, 8 images; method, optimisers, schedules, presets untouched."""
    run = config(name)
    if run.mpl.data.source in LENGTHS:  # as small as it is
        return (f'mpl_scale.logging={{"every": {STEPS}, "progress": "off"}}', "train_batch_size=8")
    section, large = run.mpl, run.mpl.parallel.width > 1
    network = {"name": "test_efficientnet"} if large else {"name": "digits_cnn", "kwargs": {"widths": [4, 6]}}
    drop_path = section.model.student.drop_path if large else 0.0
    model: dict[str, Any] = {"num_classes": 10, "image_size": 32 if large else 8}
    sees_images = METHODS[section.method.name].teacher_sees_images
    for side in ("teacher", "student") if sees_images else ("student",):
        model |= {f"{side}.{key}": value for key, value in {**network, "drop_path": drop_path}.items()}
    micro = 4 if large else 2
    changes: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": micro if run.deepspeed.get("train_micro_batch_size_per_gpu") else None,
        **{f"mpl_scale.model.{key}": value for key, value in model.items()},
        **{f"mpl_scale.data.{key}": value for key, value in {"source": "digits", "root": None, "threads": 1}.items()},
        "mpl_scale.data.split": "stratified",
        "mpl_scale.data.labelled_per_class": 4,
        "mpl_scale.parallel.engine": "flat",
        "mpl_scale.parallel.width": min(section.parallel.width, 2),
        "mpl_scale.parallel.shard_size": None,
        "mpl_scale.phases.train.evaluate_every": 0,
        "mpl_scale.phases.finetune.batch_size": 8,
        "mpl_scale.checkpoint.every": 0,
        "mpl_scale.logging": {"every": STEPS, "progress": "off"},
    }
    return tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())


def short_run(name: str, output: str) -> Any:
    changes = reduced(name)
    if config(name).mpl.data.distributions is not None:
        changes += (f"mpl_scale.data.distributions={output}/distributions.npy",)
    return train(config(name, changes), Options(Path(output), max_steps=STEPS))


def last_rate(optim: OptimConfig) -> float:
    """The learning rate of step 20 of 20, by the schedules' formulas."""
    if optim.schedule == "constant":
        return optim.lr
    if optim.warmup_steps >= STEPS:
        return optim.lr * STEPS / optim.warmup_steps
    assert not optim.warmup_steps
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (STEPS - 1) / STEPS))


@pytest.mark.parametrize(
    "name", [marked(name, *REPEATED) for name in (NAMES if os.environ.get("MPL_SCALE_TEST_ALL") else TRAINED)]
)
def test_trains_twenty_steps_on_two_ranks(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "distributions.npy", np.random.default_rng(0).dirichlet([0.3] * 10, 1797).astype(np.float16))
    summary = pool(2).run(short_run, name, str(tmp_path))[0]
    section = config(name).mpl
    steps = {
        "teacher_warmup": section.phases.teacher_warmup.steps,
        "train": 1,
        "finetune": section.phases.finetune.steps,
    }
    expected = [phase for phase, count in steps.items() if count]
    assert summary["steps"] == STEPS * len(expected)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = {row["phase"]: row for row in rows if "images_per_second" in row}
    assert list(lines) == expected
    for phase, line in lines.items():
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), line
        side = "teacher" if phase == "teacher_warmup" else "student"
        optim = getattr(section.optim, side)
        rate = section.phases.finetune.optim.lr if phase == "finetune" else last_rate(optim)
        assert line[f"{side}_lr"] == pytest.approx(rate, rel=1e-5)  # the schedule is float32


# ---- include


def test_included_sections_lie_below_the_files_own(tmp_path: Path) -> None:
    """Sections merge at any depth, later includes over earlier ones, lists as a whole; paths are the file's own."""
    base = tiny()
    (tmp_path / "layouts").mkdir()
    write(tmp_path, base, "base.json")
    write(tmp_path / "layouts", {"include": "../base.json", "mpl_scale": {"seed": 5}}, "seed.json")
    write(tmp_path, {"train_batch_size": 20, "mpl_scale": {"seed": 7, "parallel": {"engine": "flat"}}}, "layout.json")
    own = {"include": ["layouts/seed.json", "layout.json"], "mpl_scale": {"optim": {"student": {"lr": 0.5}}}}
    run = load_config(write(tmp_path, own), overrides=["mpl_scale.data.mean=[0, 0, 0]"])
    expected = json.loads(json.dumps(base))
    expected["train_batch_size"] = 20
    expected["mpl_scale"] |= {"seed": 7, "parallel": {"engine": "flat"}}
    expected["mpl_scale"]["optim"]["student"]["lr"] = 0.5
    expected["mpl_scale"]["data"]["mean"] = [0, 0, 0]
    assert run.resolved() == load_config(write(tmp_path, expected, "expected.json")).resolved()


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ("run.json", r"run.json includes \S*run.json: a circle; remove one of the includes"),
        ("circle.json", r"run.json includes \S*circle.json includes \S*run.json: a circle"),
        ("basis.json", r"run.json: include \S*basis.json: no such file; did you mean \S*base.json\?"),
        (5, r"run.json: include = \[?5\]?: must be the path of a ds_config, or a list"),
        ([["base.json"]], r"must be the path of a ds_config, or a list"),
    ],
    ids=str,
)
def test_a_bad_include_is_one_clear_line(tmp_path: Path, include: object, message: str) -> None:
    write(tmp_path, tiny(), "base.json")
    write(tmp_path, {"include": "run.json"}, "circle.json")
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path, {"include": include}))
    assert "\n" not in str(caught.value)


# ---- split all_labelled


def test_all_labelled_takes_every_shard_but_the_folder_of_unlabelled_ones(tmp_path: Path) -> None:
    """4 labelled shards of 12 images, the last held out; 48 unlabelled images beside them; 12 of a test part."""
    mini.write_tfrecord(tmp_path / "data", shards=4)
    (tmp_path / "data" / "validation.tfrecord").write_bytes((tmp_path / "data" / "train-00000-of-00004").read_bytes())
    mini.write_tfrecord(tmp_path / "data" / "unlabelled", shards=4)
    build_index("tfrecord", tmp_path / "data", output=tmp_path / "index")
    images = IndexedImages(tmp_path / "index")
    found = split(images, "all_labelled", held_out_shards=1, unlabelled_from="rest")
    assert found.labelled.tolist() == list(range(36))
    assert found.held_out.tolist() == list(range(36, 48))
    assert found.unlabelled.tolist() == list(range(48, 96))
    assert found.test.tolist() == list(range(96, 108))
    with pytest.raises(ValueError, match=r"held_out_shards = 4 of 4 labelled training shards leaves none"):
        split(images, "all_labelled", held_out_shards=4)
