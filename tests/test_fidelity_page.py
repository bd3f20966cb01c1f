"""docs/fidelity.md leaves out no table, figure or appendix of the paper, and no silent choice of a config."""

from __future__ import annotations

import re

import pytest

from tests.support.paper_configs import FOLDER, NAMES, paper_row, settings

PAGE = (FOLDER.parent / "docs" / "fidelity.md").read_text()


def section_of(heading: str) -> str:
    found = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert found
    return found


def test_every_table_figure_and_appendix_has_a_command_or_a_reason() -> None:
    section = section_of("Every table, figure and appendix")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    parts = {name for head, *_ in lines[2:] for name in re.findall(r"(?:Table|Figure) \d+|C\.[1-4]|Appendix E", head)}
    assert {f"Table {number}" for number in range(1, 12)} | {f"Figure {number}" for number in range(1, 6)} <= parts
    assert {"C.1", "C.2", "C.3", "C.4", "Appendix E"} <= parts
    assert "Appendices A, B" in section
    assert "Appendices D.1 to D.5" in section
    assert all(command != "none" or missing for _, command, missing in lines[2:])
    named = {name for _, command, _ in lines for name in re.findall(r"`(\w+)`", command)}
    assert {paper_row(name) for name in NAMES} - named == {"digits", "fashion_mnist"}
    assert all((FOLDER / f"{name}.json").exists() for name in named if name.startswith(("cifar10_", "svhn_", "b7_")))


SAID = {
    "crop of evaluation": ("l2 b7_supervised", r"crop of evaluation .*0\.94[19]"),
    "moving average of weights": (
        "cifar10_4k svhn_1k imagenet10_resnet50 l2 b7_supervised cifar10_4k_uda svhn_1k_uda imagenet10_resnet50_uda "
        "imagenet10_resnet50_uda_autoaugment "
        "cifar10_4k_supervised svhn_1k_supervised imagenet10_resnet50_supervised cifar10_noisy_student "
        "svhn_noisy_student cifar10_b0_supervised svhn_b0_supervised imagenet_jft_resnet50_uda "
        "imagenet_jft_resnet50_noisy_student cifar10_supervised_full svhn_supervised_full "
        "imagenet_resnet50_supervised_full imagenet100_resnet50_randaugment",
        r"ema_decay",
    ),
    "translation at level 27": ("l2 b7_supervised", r"translation is 100 pixels at level 10"),
    "finetuning": (
        "cifar10_4k svhn_1k imagenet10_resnet50 imagenet_jft_resnet50 l2",
        r"[Ff]inetuning.* from the student \(not its average\).* no decay.*dropout.* smoothing",
    ),
    "last 20 shards": ("imagenet10_resnet50", r"last 20 shards are held out and not unlabelled"),
    "unlabelled images of SVHN-1K": ("svhn_1k", r"598,388 unlabelled .* about 603,000"),
    "the student's view in Table 10": (
        "cifar10_4k_mpl_mixup cifar10_4k_mpl_pseudo_label",
        r"student sees RandAugment.*numbers speak against it",
    ),
    "`labelled_view: strong`": ("cifar10_4k_mpl_randaugment", r"reaches the feedback's gradient g_l and finetuning"),
    "What h sees": ("cifar10_4k svhn_1k imagenet10_resnet50 imagenet_jft_resnet50 l2", r"What h sees"),
}


@pytest.mark.parametrize("choice", SAID)
def test_a_silent_choice_is_said_in_the_headers_and_in_fidelity(choice: str) -> None:
    names, pattern = SAID[choice]
    for name in names.split():
        assert re.search(pattern, settings(name)["mpl_scale.paper"]), name
    assert choice in section_of("Silent choices")
