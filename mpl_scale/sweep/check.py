"""Validate the configuration of every run of a sweep before the first one starts."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mpl_scale.config import RunConfig, check, load_config
from mpl_scale.sweep.folder import Task
from mpl_scale.sweep.spec import Spec
from mpl_scale.trainer.preflight import check_models, check_names


def check_tasks(spec: Spec, tasks: Sequence[Task], *, ranks: int, cuda: bool) -> None:
    """Everything that needs no data, of each; networks are built once for each set of their settings.

    Args:
        spec: whose runs these are.
        tasks: to check.
        ranks: of each run.
        cuda: whether they compute on GPUs.

    Raises:
        ValueError: names the spec, the run, and what is wrong as train.py would.
    """
    seen: set[str] = set()
    for task in tasks:
        overrides = [f"{field}={json.dumps(value)}" for field, value in task.values.items()]
        try:
            run = load_config(spec.ds_config, overrides=overrides)
            check(run, world=ranks, cuda=cuda)
            check_names(run)
            networks = _networks(run)
            if networks not in seen:
                check_models(run)
                seen.add(networks)
        except ValueError as error:
            raise ValueError(f"{spec.path}: {task.name}: {error}") from error


def _networks(run: RunConfig) -> str:
    """The settings that decide how networks are built; runs that share them need one check."""
    mpl = run.mpl
    parts = (mpl.model.model_dump(mode="json"), mpl.parallel.model_dump(mode="json"), mpl.method.name)
    return json.dumps(parts, sort_keys=True)
