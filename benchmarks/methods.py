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
}
COLUMNS = ("student", "ema", "teacher", "finetuned")
