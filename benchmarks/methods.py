"""Methods side by side on one data set, in one launch: supervised, UDA, MPL without feedback, MPL, MPL + finetune.

    deepspeed --num_accelerators 2 benchmarks/methods.py --ds_config ds_configs/digits.json --seeds 0 1 2 3 4

Every method is a full run of its own (files in OUTPUT/METHOD/seed_N), with the same data split, batches and initial
weights per seed; a run that is DONE is not repeated. Prints the table, and writes it to OUTPUT/table.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from mpl_scale.cli.command import replace_missing_characters
from mpl_scale.config import load_config
from mpl_scale.mesh import adopt_slurm_environment, choose_device, start_process_group
from mpl_scale.monitor import format_table
from mpl_scale.trainer.prepare import Options, train

METHODS = {
    "supervised": ["mpl_scale.method.name=supervised", "mpl_scale.phases.finetune.steps=0"],
    "pseudo_label": [
        "mpl_scale.method.name=pseudo_label",
        "mpl_scale.phases.teacher_warmup.steps=500",
        "mpl_scale.phases.finetune.steps=0",
    ],
    "uda": ["mpl_scale.method.name=uda", "mpl_scale.phases.finetune.steps=0"],
    "mpl_no_feedback": ["mpl_scale.method.feedback.rule=none"],
    "mpl": [],
    "mpl_flipped": ["mpl_scale.method.feedback.rule=flipped"],
    "mpl_per_sample": ["mpl_scale.method.feedback.rule=per_sample"],
    "mpl_soft_exact": ["mpl_scale.method.feedback.rule=soft_exact", "mpl_scale.method.pseudo_labels=soft"],
    "mixup": ["mpl_scale.method.name=mixup", "mpl_scale.phases.finetune.steps=0"],
    "randaugment": [
        "mpl_scale.method.name=supervised",
        "mpl_scale.data.labelled_view=strong",
        "mpl_scale.phases.finetune.steps=0",
    ],
    "mpl_over_supervised": ["mpl_scale.method.teacher_loss=supervised"],
    "mpl_over_mixup": ["mpl_scale.method.teacher_loss=mixup"],
    "mpl_over_pseudo_label": ["mpl_scale.method.teacher_loss=pseudo_label"],
}


def main() -> int:
    replace_missing_characters()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:5], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", action="append", default=[], help="as train.py's, for every method")
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    options = parser.parse_args()

    adopt_slurm_environment(os.environ)
    main_rank = os.environ.get("RANK", "0") == "0"
    start_process_group(choose_device(os.environ), timeout_seconds=600)
    rows = []
    for seed in options.seeds:
        for method in options.methods:
            config = load_config(
                options.ds_config, overrides=[*METHODS[method], *options.set, f"mpl_scale.seed={seed}"]
            )
            folder = options.output / method / f"seed_{seed}"
            if main_rank:
                print(f"== {method}, seed {seed}: {folder}", flush=True)
            summary = train(config, Options(folder, "auto", options.max_steps))
            assert summary is not None  # no stop request can come
            rows += [{"method": label, **values} for label, values in _rows(method, summary["results"])]
    if main_rank:
        table = format_table(rows, by=["method"], columns=dict.fromkeys(("top-1", "EMA top-1"), ".2f"))
        (options.output / "table.md").write_text(table + "\n")
        (options.output / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
        print(
            f"\n{table}\n\nAccuracy on the held-out third, percent. Files of each run: {options.output}/METHOD/seed_N"
        )
    dist.destroy_process_group()
    return 0


def _rows(method: str, results: dict[str, dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    """One table row for the trained network, one for its finetuned version."""
    values = {"top-1": results["student"]["top1"]}
    if "ema" in results:
        values["EMA top-1"] = results["ema"]["top1"]
    rows = [(method, values)]
    if "finetuned" in results:
        rows.append((f"{method}+finetune", {"top-1": results["finetuned"]["top1"]}))
    return rows


if __name__ == "__main__":
    sys.exit(main())
