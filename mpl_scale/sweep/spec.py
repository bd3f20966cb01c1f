"""The file that declares a sweep, read and refused as strictly as a ds_config.

{"ds_config": "digits.json",
 "space": {"mpl_scale.optim.student.lr": {"log_uniform": [0.01, 1]},
           "mpl_scale.method.uda.weight": {"choices": [1, 2, 5]}},
 "set": {"mpl_scale.phases.train.steps": 500},
 "trials": 128, "seed": 0, "metric": "finetuned.top1",
 "best": 5, "seeds": [1, 2, 3], "final_set": {"mpl_scale.phases.train.steps": 1000}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpl_scale.config.load import SHOWN
from mpl_scale.config.names import require_known, suggest
from mpl_scale.config.presets import flatten
from mpl_scale.files import read_object
from mpl_scale.sweep.space import Draw, parse, uniform

SEED = "mpl_scale.seed"
KEYS = {
    "ds_config": "the run's JSON, relative to this file",
    "space": "fields by dotted path, as of --set, and how their values are drawn",
    "set": "fields with one value, for all runs",
    "trials": "how many are drawn; default 128",
    "seed": "of the draws; default 0",
    "metric": "what is compared, as student.top1; default: finetuned.top1 where the runs have it, else student.top1",
    "best": "how many trials run again on every one of `seeds`; default 1",
    "seeds": "mpl_scale.seed of the final runs; default: none, and so no final runs",
    "final_set": "fields that the final runs have otherwise, as mpl_scale.data.evaluate_on",
}
NETWORKS = ("student", "ema", "teacher", "finetuned")
MEASURES = ("top1", "top5", "loss")
TRIALS = 128
"""The paper's number."""
MOST_TRIALS = 100_000


@dataclass(frozen=True)
class Spec:
    """A sweep, as it is declared. settings: of all runs; ds_config: the path as this process reaches it."""

    path: Path
    ds_config: Path
    space: Mapping[str, Draw]
    declared: Mapping[str, Any]
    settings: Mapping[str, Any]
    final_settings: Mapping[str, Any]
    trials: int
    seed: int
    metric: str | None
    best: int
    seeds: Sequence[int]

    def trial(self, index: int) -> dict[str, Any]:
        """Fields and values of a trial: a function of the space, the seed and the index."""
        drawn = {field: draw(uniform(seed=self.seed, index=index, field=field)) for field, draw in self.space.items()}
        return {**self.settings, **flatten(drawn)}

    def final(self, index: int, *, seed: int) -> dict[str, Any]:
        """A trial's fields and values for a final run on that seed."""
        return {**self.trial(index), **self.final_settings, SEED: seed}


def read_spec(path: Path, *, trials: int | None = None, seed: int | None = None, seeds: int | None = None) -> Spec:
    """Read a spec; `trials` and `seed`, where given, replace the file's, and `seeds` its list by 1 to that number.

    Raises:
        ValueError: names the file, the field, the value and the fix.
    """
    raw = read_object(path, fix="give the JSON that declares a sweep")
    if seeds is not None:
        raw["seeds"] = list(range(1, seeds + 1))
    try:
        return _parsed(path, raw, trials=trials, seed=seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections in sections, from dotted fields."""
    found: dict[str, Any] = {}
    for field, value in values.items():
        *sections, last = field.split(".")
        target = found
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return found


def _parsed(path: Path, raw: dict[str, Any], *, trials: int | None, seed: int | None) -> Spec:
    for key in raw:
        if key not in KEYS:
            raise ValueError(f'unknown key "{key}"; {suggest(key, KEYS)}')
    for key in ("ds_config", "space"):
        if key not in raw:
            raise ValueError(f"{key} is missing: {KEYS[key]}")
    if not isinstance(raw["ds_config"], str):
        raise ValueError(f"ds_config = {raw['ds_config']!r}: must be a path")
    space, settings, final = (_section(raw, key) for key in ("space", "set", "final_set"))
    if not space:
        raise ValueError("space is empty: name at least one field, or train once with train.py")
    settings, final = flatten(settings), flatten(final)
    _refuse_overlaps({**dict.fromkeys(space, "space"), **dict.fromkeys(settings, "set")}, len(space) + len(settings))
    seeds = raw.get("seeds", [])
    if "seeds" in raw and seeds == []:
        raise ValueError("seeds is empty: name at least one, or leave it out for no final runs")
    if (
        not isinstance(seeds, list)
        or not all(_whole(value, 0) and value < 1 << 32 for value in seeds)
        or len(set(seeds)) != len(seeds)
    ):
        raise ValueError(
            f"seeds = {f'{seeds!r}'[:SHOWN]}: must be a list of different whole numbers from 0 to 2**32 - 1"
        )
    if seeds and (SEED in space or SEED in final):
        raise ValueError(f"{SEED} is set by `seeds` in the final runs; leave it out of space and final_set")
    metric = raw.get("metric")
    if metric is not None and (not isinstance(metric, str) or metric.count(".") != 1):
        raise ValueError(f"metric = {metric!r}: must be a network and a measure, as student.top1")
    if metric is not None:
        require_known("metric", metric, [f"{network}.{measure}" for network in NETWORKS for measure in MEASURES])
    trials = _number(raw, "trials", TRIALS, least=1) if trials is None else trials
    if trials > MOST_TRIALS:
        raise ValueError(f"trials = {trials}: each has a folder of its own; use {MOST_TRIALS} or fewer")
    best = _number(raw, "best", 1, least=1)
    if best > trials:
        raise ValueError(f"best = {best} of trials = {trials}: there are not as many; lower best, or raise trials")
    return Spec(
        path=path,
        ds_config=path.parent / raw["ds_config"],
        space={field: parse(field, given) for field, given in space.items()},
        declared=space,
        settings=settings,
        final_settings=final,
        trials=trials,
        seed=_number(raw, "seed", 0, least=0) if seed is None else seed,
        metric=metric,
        best=best,
        seeds=seeds,
    )


def _section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = raw.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"{key} = {section!r}: must be an object: {KEYS[key]}")
    for field in section:
        if not all(field.split(".")):
            raise ValueError(f"{key}.{field}: write it as section.field")
    return section


def _refuse_overlaps(fields: Mapping[str, str], given: int) -> None:
    """Raise ValueError where a field is given twice or lies inside another."""
    if len(fields) != given:
        raise ValueError("a field stands both in space and in set; remove one")
    for field in fields:
        inside = [other for other in fields if field.startswith(f"{other}.")]
        if inside:
            raise ValueError(f"{fields[field]}.{field} lies inside {fields[inside[0]]}.{inside[0]}; remove one")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(raw: Mapping[str, Any], key: str, default: int, *, least: int) -> int:
    value = raw.get(key, default)
    if not _whole(value, least):
        raise ValueError(f"{key} = {value!r}: must be a whole number of at least {least}")
    return int(value)
