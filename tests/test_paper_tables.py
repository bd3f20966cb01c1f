"""Every config that stands for a row of the paper has the paper's numbers, which are written here, from the paper.

Tables 5 to 8, sections 3.2, 3.3 and 4, appendices C and E of arXiv 2003.10580. Nothing is read from the configs but
what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mpl_scale.augment import OP_SETS
from mpl_scale.config import check, load_config
from mpl_scale.mpl import METHODS
from tests.support.paper_configs import FOLDER, NAMES, paper_row, settings

NOT_OF_A_TABLE = {"digits", "fashion_mnist", "two_moons", "two_moons_uda"}
"""Data sets that the paper has not; section 3.1, of which it gives no table."""

# ---- the paper's tables, as printed: columns CIFAR-10, SVHN, ImageNet

COLUMNS = ("CIFAR-10", "SVHN", "ImageNet")
TABLE_6 = {
    "weight decay": (0.0005, 0.001, 0.0002),
    "label smoothing": (0, 0, 0.1),
    "batch normalization decay": (0.99, 0.99, 0.99),
    "learning rate": (0.4, 0.05, 1.28),
    "steps": (50_000, 50_000, 40_000),
    "warm up": (2500, 0, 2000),
    "batch": (1024, 128, 2048),
    "dropout": (0.4, 0.5, 0.2),
}
PSEUDO_LABEL_THRESHOLD = (0.95, 0.975, 0.7)
TABLE_7 = {
    "weight decay": (0.0005, 0.0005, 0.0002),
    "label smoothing": (0, 0, 0.1),
    "batch normalization decay": (0.99, 0.99, 0.99),
    "learning rate": (0.3, 0.4, 1.28),
    "steps": (1_000_000, 1_000_000, 500_000),
    "warm up": (5000, 5000, 5000),
    "batch": (128, 128, 2048),
    "dropout": (0.5, 0.6, 0.25),
    "UDA factor": (2.5, 1, 20),
    "UDA temperature": (0.7, 0.8, 0.7),
}
TABLE_8 = {
    "weight decay": (0.0005, 0.0005, 0.0002),
    "label smoothing": (0.1, 0.1, 0.1),
    "student label smoothing": (0.1, 0.1, 0.1),
    "batch normalization decay": (0.99, 0.99, 0.99),
    "steps": (1_000_000, 1_000_000, 500_000),
    "warm up": (2000, 2000, 1000),
    "student learning rate": (0.3, 0.15, 0.8),
    "batch": (128, 128, 2048),
    "student dropout": (0.35, 0.45, 0.1),
    "teacher learning rate": (0.125, 0.05, 0.5),
    "teacher dropout": (0.5, 0.65, 0.1),
    "UDA factor": (1.0, 2.5, 16.0),
    "UDA temperature": (0.8, 1.25, 0.75),
}
BOTH = ("student", "teacher")
FIELDS: dict[str, tuple[str, ...]] = {
    "weight decay": tuple(f"mpl_scale.optim.{who}.weight_decay" for who in BOTH),
    "label smoothing": ("mpl_scale.method.label_smoothing",),
    "student label smoothing": ("mpl_scale.method.student_label_smoothing",),
    "batch normalization decay": ("mpl_scale.model.bn_decay",),
    "learning rate": tuple(f"mpl_scale.optim.{who}.lr" for who in BOTH),
    "student learning rate": ("mpl_scale.optim.student.lr",),
    "teacher learning rate": ("mpl_scale.optim.teacher.lr",),
    "steps": ("mpl_scale.phases.train.steps",),
    "teacher steps": ("mpl_scale.phases.teacher_warmup.steps",),
    "warm up": tuple(f"mpl_scale.optim.{who}.warmup_steps" for who in BOTH),
    "batch": ("train_batch_size",),
    "dropout": tuple(f"mpl_scale.model.{who}.dropout" for who in BOTH),
    "student dropout": ("mpl_scale.model.student.dropout",),
    "teacher dropout": ("mpl_scale.model.teacher.dropout",),
    "UDA factor": ("mpl_scale.method.uda.weight",),
    "UDA temperature": ("mpl_scale.method.uda.temperature",),
    "pseudo label threshold": ("mpl_scale.method.pseudo_label_threshold",),
    "optimiser": tuple(f"mpl_scale.optim.{who}.name" for who in BOTH),
    "Nesterov": tuple(f"mpl_scale.optim.{who}.nesterov" for who in BOTH),
    "momentum": tuple(f"mpl_scale.optim.{who}.momentum" for who in BOTH),
    "schedule": tuple(f"mpl_scale.optim.{who}.schedule" for who in BOTH),
    "network": tuple(f"mpl_scale.model.{who}.name" for who in BOTH),
    "student network": ("mpl_scale.model.student.name",),
    "teacher network": ("mpl_scale.model.teacher.name",),
    "teacher hidden": ("mpl_scale.model.teacher.kwargs.hidden",),
    "image size": ("mpl_scale.model.image_size",),
    "split": ("mpl_scale.data.split",),
    "held-out shards": ("mpl_scale.data.held_out_shards",),
    "labelled fraction": ("mpl_scale.data.labelled_fraction",),
    "labelled a class": ("mpl_scale.data.labelled_per_class",),
    "unlabelled from": ("mpl_scale.data.unlabelled_from",),
    "operations": ("mpl_scale.data.strong.op_set",),
    "policy": ("mpl_scale.data.strong.policy",),
    "number of operations": ("mpl_scale.data.strong.num_ops",),
    "labelled view": ("mpl_scale.data.labelled_view",),
    "method": ("mpl_scale.method.name",),
    "teacher's loss": ("mpl_scale.method.teacher_loss",),
    "feedback": ("mpl_scale.method.feedback.rule",),
    "baseline": ("mpl_scale.method.feedback.baseline",),
    "finetuning optimiser": ("mpl_scale.phases.finetune.optim.name",),
    "finetuning rate": ("mpl_scale.phases.finetune.optim.lr",),
    "finetuning momentum": ("mpl_scale.phases.finetune.optim.momentum",),
    "finetuning schedule": ("mpl_scale.phases.finetune.optim.schedule",),
    "finetuning batch": ("mpl_scale.phases.finetune.batch_size",),
    "finetuning steps": ("mpl_scale.phases.finetune.steps",),
    "width": ("mpl_scale.parallel.width",),
}
Row = dict[str, Any]


def column(table: Mapping[str, tuple[Any, ...]], name: str) -> Row:
    return {field: values[COLUMNS.index(name)] for field, values in table.items()}


# ---- what the text gives beside the tables

SGD = {"optimiser": "sgd", "Nesterov": True, "momentum": 0.9, "schedule": "cosine"}  # C.4, Optimizers
DATA = {  # 3.2 and C.1
    "CIFAR-10": {"network": "wide_resnet28_2", "image size": 32, "split": "cifar10_4k"},
    "SVHN": {"network": "wide_resnet28_2", "image size": 32, "split": "svhn_1k"},
    "ImageNet": {"network": "resnet50", "image size": 224, "split": "imagenet_10", "labelled fraction": 0.1},
}
FINETUNING = {  # 3.2: "a fixed learning rate of 10^-5 and a batch size of 512", 2,000 steps or 1,000
    "finetuning optimiser": "sgd",
    "finetuning rate": 1e-5,
    "finetuning schedule": "constant",
    "finetuning batch": 512,
}
FINETUNING_STEPS = {"CIFAR-10": 1000, "SVHN": 1000, "ImageNet": 2000}
TABLE_5 = {"CIFAR-10": "cifar10", "SVHN": "svhn", "ImageNet": "imagenet"}
ALONE = {"finetuning steps": 0}


def supervised(name: str, **changes: Any) -> Row:
    return {**DATA[name], **SGD, **column(TABLE_6, name), "method": "supervised", **ALONE, **spaced(changes)}


def pseudo_label(name: str) -> Row:
    """Equation 1: the teacher is the supervised network of the same column."""
    threshold = PSEUDO_LABEL_THRESHOLD[COLUMNS.index(name)]
    steps = TABLE_6["steps"][COLUMNS.index(name)]
    return supervised(name, method="pseudo_label", pseudo_label_threshold=threshold, teacher_steps=steps)


def uda(name: str) -> Row:
    row = {**DATA[name], **SGD, **column(TABLE_7, name), "method": "uda", **ALONE}
    return {**row, "operations": TABLE_5[name]}


def mpl(name: str, **changes: Any) -> Row:
    cosine = {"feedback": "cosine", "baseline": True}  # C.3
    finetuning = {**FINETUNING, "finetuning steps": FINETUNING_STEPS[name]}
    row = {**DATA[name], **SGD, **column(TABLE_8, name), **cosine, **finetuning}
    return {**row, "method": "mpl", "teacher's loss": "uda", "operations": TABLE_5[name], **spaced(changes)}


def spaced(changes: Mapping[str, Any]) -> Row:
    return {name.replace("_", " "): value for name, value in changes.items()}


# Section 3.3: "the same as in Section 3.2 but ... a larger batch size and more training steps"
ALL_BUT_25_000 = {"split": "all_labelled", "held-out shards": 20, "unlabelled from": "rest"}  # C.1, 3.3, section 4
JFT = {**mpl("ImageNet", batch=4096, steps=500_000, finetuning_steps=10_000, finetuning_rate=1e-4), **ALL_BUT_25_000}
# Section 4 and C.4; UDA and smoothing are Table 8's ImageNet, the rest Noisy Student's, which is another paper
LARGE: Row = {
    **{field: TABLE_8[field][2] for field in ("label smoothing", "student label smoothing", "UDA factor")},
    "UDA temperature": 0.75,
    "batch normalization decay": 0.99,
    "batch": 2048,
    "steps": 1_000_000,
    "image size": 512,
    "optimiser": "rmsprop",
    "schedule": "exponential",
    "width": 16,
    **ALL_BUT_25_000,
    "method": "mpl",
    "teacher's loss": "uda",
    "feedback": "cosine",
    "baseline": True,
    "operations": "imagenet",
    "finetuning optimiser": "lars",
    "finetuning rate": 0.001,
    "finetuning momentum": 0.9,
    "finetuning batch": 4096,
    "finetuning steps": 20_000,
}
# Appendix E: architectures, hidden units, held-out images; steps and rates are open, and Table 6's are taken
B0: Row = {"student network": "tf_efficientnet_b0", "image size": 32}
B7: Row = {"student network": "tf_efficientnet_b7", "held-out shards": 40, "split": "all_labelled"}
OPEN_IN_E = ("network", "dropout", "split", "learning rate")


def appendix_e(name: str, **changes: Any) -> Row:
    row = {field: value for field, value in supervised(name).items() if field not in OPEN_IN_E}
    return {**row, **B0, "student learning rate": TABLE_6["learning rate"][COLUMNS.index(name)], **spaced(changes)}


def reduced(name: str, hidden: int = 128) -> Row:
    row = appendix_e(name, method="reduced_mpl", teacher_network="reduced_teacher", teacher_hidden=hidden)
    return {**row, "finetuning steps": FINETUNING_STEPS[name], "feedback": "cosine"}


ROWS: dict[str, Row] = {
    "cifar10_4k": mpl("CIFAR-10"),
    "svhn_1k": mpl("SVHN"),
    "imagenet10_resnet50": mpl("ImageNet"),
    "cifar10_4k_uda": uda("CIFAR-10"),
    "svhn_1k_uda": uda("SVHN"),
    "imagenet10_resnet50_uda": uda("ImageNet"),
    "imagenet10_resnet50_uda_autoaugment": {**uda("ImageNet"), "operations": None, "policy": "autoaugment"},  # C.4
    "cifar10_4k_supervised": supervised("CIFAR-10"),
    "svhn_1k_supervised": supervised("SVHN"),
    "imagenet10_resnet50_supervised": supervised("ImageNet"),
    "cifar10_4k_pseudo_label": pseudo_label("CIFAR-10"),
    "svhn_1k_pseudo_label": pseudo_label("SVHN"),
    "imagenet10_resnet50_pseudo_label": pseudo_label("ImageNet"),
    "cifar10_supervised_full": supervised("CIFAR-10", split="all_labelled"),
    "svhn_supervised_full": supervised("SVHN", split="all_labelled"),
    "imagenet_resnet50_supervised_full": supervised("ImageNet", split="all_labelled"),
    # Table 9: the amount of smoothing is open; D.2: "we do not use RandAugment", unlabelled are the labelled images
    "cifar10_4k_label_smoothing": supervised("CIFAR-10", label_smoothing=0.1),
    "svhn_1k_label_smoothing": supervised("SVHN", label_smoothing=0.1),
    "cifar10_4k_mpl_regularizer": mpl("CIFAR-10", number_of_operations=0, unlabelled_from="labelled"),
    "svhn_1k_mpl_regularizer": mpl("SVHN", number_of_operations=0, unlabelled_from="labelled"),
    # Table 10 and Figures 3 and 5
    "cifar10_4k_mixup": supervised("CIFAR-10", method="mixup"),
    "cifar10_4k_randaugment": supervised("CIFAR-10", labelled_view="strong"),
    "imagenet10_resnet50_randaugment": supervised("ImageNet", labelled_view="strong"),
    "cifar10_4k_mpl_mixup": {**mpl("CIFAR-10"), "teacher's loss": "mixup"},
    "cifar10_4k_mpl_pseudo_label": {
        **mpl("CIFAR-10", pseudo_label_threshold=PSEUDO_LABEL_THRESHOLD[0]),
        "teacher's loss": "pseudo_label",
    },
    "cifar10_4k_mpl_randaugment": {
        **mpl("CIFAR-10", labelled_view="strong", operations="no_pairing"),
        "teacher's loss": "supervised",
    },
    "imagenet10_resnet50_mpl_supervised": {**mpl("ImageNet"), "teacher's loss": "supervised"},
    "imagenet100_resnet50": {
        **mpl("ImageNet", split="all_labelled", unlabelled_from="labelled"),
        "held-out shards": 0,
    },
    "imagenet100_resnet50_randaugment": supervised("ImageNet", split="all_labelled", labelled_view="strong"),
    # Table 3; UDA and Noisy Student are quoted there: 3.3's images, batch and steps with Tables 7 and 6
    "imagenet_jft_resnet50": JFT,
    "imagenet_jft_resnet50_uda": {**uda("ImageNet"), **ALL_BUT_25_000, "batch": 4096, "steps": 500_000},
    "imagenet_jft_resnet50_noisy_student": {
        **supervised("ImageNet", method="noisy_student", batch=4096, steps=500_000, teacher_steps=40_000),
        **ALL_BUT_25_000,
    },
    "l2": {**LARGE, "network": "tf_efficientnet_l2"},
    "b6_wide": {**LARGE, "network": "efficientnet_b6_wide"},
    # Table 11
    "cifar10_b0_supervised": appendix_e("CIFAR-10", labelled_a_class=4500),
    "svhn_b0_supervised": appendix_e("SVHN"),
    "cifar10_noisy_student": appendix_e("CIFAR-10", method="noisy_student", labelled_a_class=4500),
    "svhn_noisy_student": appendix_e("SVHN", method="noisy_student", operations="svhn"),
    "cifar10_reduced_mpl": reduced("CIFAR-10"),
    "svhn_reduced_mpl": reduced("SVHN"),
    "b7_supervised": {**B7, **ALONE, "method": "supervised", "teacher network": "tf_efficientnet_b7"},
    "b7_noisy_student": {**B7, **ALONE, "method": "noisy_student"},
    "b7_reduced": {**B7, "method": "reduced_mpl", "teacher network": "reduced_teacher", "teacher hidden": 512},
}
UNLABELLED_PER_LABELLED = {name: 32_768 / 4096 for name in ROWS if name.startswith("imagenet_jft")}
UNLABELLED_PER_LABELLED |= {"l2": 16_384 / 2048, "b6_wide": 16_384 / 2048}
"""3.3 and section 4; elsewhere one: Table 7's caption, Table 8."""
RESULTS = {  # Tables 2, 3, 4, 9, 10, 11, appendix C.4
    "cifar10_4k": "96.11 +- 0.07",
    "svhn_1k": "98.01 +- 0.07",
    "imagenet10_resnet50": "73.89 / 91.38",
    "cifar10_4k_uda": "94.53 +- 0.18",
    "svhn_1k_uda": "97.11 +- 0.17",
    "imagenet10_resnet50_uda": "68.07 / 88.19",
    "imagenet10_resnet50_uda_autoaugment": "68.77",
    "cifar10_supervised_full": "94.92 +- 0.17",
    "svhn_supervised_full": "97.41 +- 0.16",
    "imagenet_resnet50_supervised_full": "76.89 / 93.27",
    "imagenet_jft_resnet50": "83.2 / 96.5",
    "l2": "90.2 / 98.8",
    "b6_wide": "90.0 / 98.7",
    "cifar10_4k_supervised": "82.14 +- 0.25",
    "svhn_1k_supervised": "88.17 +- 0.47",
    "cifar10_4k_label_smoothing": "82.21 +- 0.18",
    "svhn_1k_label_smoothing": "89.39 +- 0.25",
    "cifar10_4k_mpl_regularizer": "83.71 +- 0.21",
    "svhn_1k_mpl_regularizer": "91.89 +- 0.14",
    "cifar10_4k_pseudo_label": "83.79 +- 0.11",
    "cifar10_4k_mixup": "84.20 +- 0.15",
    "cifar10_4k_randaugment": "85.53 +- 0.25",
    "cifar10_4k_mpl_pseudo_label": "84.11 +- 0.07",
    "cifar10_4k_mpl_mixup": "84.81 +- 0.19",
    "cifar10_4k_mpl_randaugment": "87.55 +- 0.14",
    "imagenet_jft_resnet50_uda": "79.0 / 94.5",
    "imagenet_jft_resnet50_noisy_student": "78.9 / 94.3",
    "cifar10_b0_supervised": "97.18 +- 0.08",
    "svhn_b0_supervised": "98.17 +- 0.03",
    "b7_supervised": "84.49 / 97.18",
    "cifar10_noisy_student": "98.22 +- 0.05",
    "svhn_noisy_student": "98.71 +- 0.11",
    "b7_noisy_student": "85.81 / 97.53",
    "cifar10_reduced_mpl": "98.56 +- 0.07",
    "svhn_reduced_mpl": "98.78 +- 0.07",
    "b7_reduced": "86.87 / 98.11",
}
WITHOUT_A_NUMBER = {
    *("svhn_1k_pseudo_label", "imagenet10_resnet50_pseudo_label"),  # columns of Table 6 whose result is not printed
    *("imagenet10_resnet50_supervised", "imagenet10_resnet50_randaugment"),  # bars of Figure 3
    *("imagenet10_resnet50_mpl_supervised", "imagenet100_resnet50", "imagenet100_resnet50_randaugment"),  # and of 5
}


def test_every_config_stands_for_a_row() -> None:
    assert {paper_row(name) for name in NAMES} == ROWS.keys() | NOT_OF_A_TABLE
    assert RESULTS.keys() | WITHOUT_A_NUMBER == ROWS.keys()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_OF_A_TABLE])
def test_a_config_has_the_papers_numbers(name: str) -> None:
    row, found = ROWS[paper_row(name)], settings(name)
    layout = {"width"} if name != paper_row(name) else set()  # whole images on fewer devices
    has_teacher = METHODS[found["mpl_scale.method.name"]].teacher
    wrong = {
        field: (found.get(field), value)
        for label, value in row.items()
        for field in FIELDS[label]
        if label not in layout and found.get(field) != value and (has_teacher or ".teacher." not in field)
    }
    assert not wrong, f"field: (config, paper) {wrong}"
    assert found["mpl_scale.data.unlabelled_ratio"] == UNLABELLED_PER_LABELLED.get(paper_row(name), 1)


@pytest.mark.parametrize("name", RESULTS)
def test_a_header_quotes_the_papers_result(name: str) -> None:
    assert f", {RESULTS[name]}" in settings(name)["mpl_scale.paper"]


def test_the_large_models_lie_on_128_replicas_of_16_cores() -> None:
    """Section 4: 2,048 cores, 16,384 unlabelled images a step."""
    for name in ("l2", "b6_wide"):
        batches = check(load_config(FOLDER / f"{name}.json"), world=2048, cuda=True)
        assert (batches.labelled, batches.unlabelled) == (2048, 16_384)
        assert 2048 // settings(name)["mpl_scale.parallel.width"] == 128


def test_the_operations_are_table_5s() -> None:
    colours = ["autocontrast", "brightness", "color", "contrast", "equalize", "invert", "sharpness", "posterize"]
    left = [*colours, "sample_pairing", "solarize", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"]
    right = [*colours, "solarize", "shear_x", "shear_y", "translate_y"]
    assert list(OP_SETS["cifar10"]) == list(OP_SETS["imagenet"]) == left
    assert list(OP_SETS["svhn"]) == right
