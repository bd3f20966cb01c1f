"""Which run a folder's checkpoints are of, and what of it may change when it continues.

A run is its resolved configuration, its split and its data. Each checkpoint keeps them in its metadata:

    config      resolved
    identity    --max_steps, ranks, batch, steps of each phase, splits/manifest.json, hashes of data.distributions
                and of the networks' weights
    history     one entry for each start that changed something: where, what, and the results that were there before

RULES says of every field whether it may change: always, never, or depending on the phases that are done.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpl_scale.config import Config
from mpl_scale.config.deepspeed_half import settings_of
from mpl_scale.config.former import without_former_fields
from mpl_scale.config.load import SECTION
from mpl_scale.data.distributions import check_distributions
from mpl_scale.data.samples.manifest import content, describe_splits
from mpl_scale.files import expanded
from mpl_scale.models.weights import weights_file
from mpl_scale.trainer.bad_input import differences

if TYPE_CHECKING:
    from mpl_scale.trainer.run import Trainer

PHASES = ("teacher_warmup", "train", "finetune")
SHOWN = 5
"""Fields that an error names; notes before it have them all."""


@dataclass(frozen=True)
class Rule:
    """When a field may change.

    always, never: as they say. content: what the field leads to is compared instead, the entry `by` of the identity.
    unfinished: while one of `phases`, where the field takes effect, has steps left. unbegun: before all of them.
    steps: a phase's number of steps, see `Progress`.
    """

    kind: Literal["always", "never", "content", "unfinished", "unbegun", "steps"]
    phases: tuple[str, ...] = PHASES
    by: str = "manifest"


ALWAYS, NEVER, CONTENT, STEPS = Rule("always"), Rule("never"), Rule("content"), Rule("steps")
TEACHER, STUDENT, FINETUNE = PHASES[:2], PHASES[1:2], PHASES[2:]
"""The phases in which optim.teacher, optim.student and phases.finetune take effect."""

_OF_DEEPSPEED = {
    ALWAYS: "train_micro_batch_size_per_gpu gradient_accumulation_steps zero_optimization communication_data_type "
    "prescale_gradients gradient_predivide_factor disable_allgather disable_python_gc dump_state memory_breakdown "
    "wall_clock_breakdown zero_force_ds_cpu_optimizer steps_per_print zero_allow_untested_optimizer log_level "
    "tensorboard csv_monitor wandb comet comms_logger timers",
    Rule("content", by="batch"): "train_batch_size",
    Rule("unfinished"): "gradient_clipping bf16 data_types",
}
_OF_SECTION = {
    ALWAYS: "paper imports logging checkpoint guard parallel phases.train.evaluate_every",
    NEVER: "seed model method",
    Rule("content", by="weights"): "model.teacher.weights model.student.weights",
    STEPS: "phases.teacher_warmup.steps phases.train.steps phases.finetune.steps",
}
_OF_DATA = {
    ALWAYS: "check_data max_bad_fraction threads prefetch resident resident_bytes evaluation_batch",
    NEVER: "unlabelled_ratio labelled_view weak strong jitter mean std",
    CONTENT: "source root index unlabelled_index labelled unlabelled validation test label_offset "
    "allow_damaged_shards max_pixels split labelled_fraction held_out_shards labelled_per_class test_fraction "
    "split_seed unlabelled_from synthetic_images",
    Rule("content", by="distributions"): "distributions",
    Rule("unfinished"): "evaluate_on evaluation",
}
_OF_FINETUNE = {Rule("unbegun", FINETUNE): "batch_size start_from"}
_RATES = "lr schedule warmup_steps min_lr decay_rate decay_steps milestones start_fraction"
_HELD = "name momentum nesterov weight_decay layer_decay decay_bn_and_bias rho eps betas adam_eps trust"
_OF_IDENTITY = {ALWAYS: "--max_steps ranks", NEVER: "batch data splits distributions weights"}


def _table() -> dict[str, Rule]:
    groups = [
        ("", _OF_IDENTITY),
        ("", _OF_DEEPSPEED),
        (f"{SECTION}.", _OF_SECTION),
        (f"{SECTION}.data.", _OF_DATA),
        (f"{SECTION}.phases.finetune.", _OF_FINETUNE),
        *(
            (f"{SECTION}.{name}.", {Rule("unfinished", phases): _RATES, Rule("unbegun", phases): _HELD})
            for name, phases in (
                ("optim.teacher", TEACHER),
                ("optim.student", STUDENT),
                ("phases.finetune.optim", FINETUNE),
            )
        ),
    ]
    rows = [
        (f"{where}{name}", rule) for where, group in groups for rule, names in group.items() for name in names.split()
    ]
    return dict(rows)


RULES = _table()
"""By dotted field, or by section for all that is in it."""


def rule_of(field: str) -> Rule | None:
    """The rule of a field, or of the innermost section that has a rule; None: no rule."""
    while field:
        if field in RULES:
            return RULES[field]
        field = field.rpartition(".")[0]
    return None


def describe(trainer: Trainer, *, max_steps: int | None) -> dict[str, Any]:
    """What the checkpoints of a run keep of its identity: config and identity. For rank 0; every id is hashed."""
    run, batches = trainer.config, trainer.resolved.batches
    data, model, splits = run.mpl.data, run.mpl.model, trainer.source.splits
    stored = None if data.is_synthetic else data.distributions
    networks = {f"mpl_scale.model.{name}": getattr(model, name) for name in ("teacher", "student")}
    return {
        "config": run.resolved(),
        "identity": {
            "max_steps": max_steps,
            "ranks": trainer.mesh.world,
            "batch": {"labelled": batches.labelled, "unlabelled": batches.unlabelled},
            "steps": {phase.name: phase.steps for phase in trainer.phases},
            "manifest": describe_splits(splits),
            "distributions": stored and check_distributions(expanded(stored), splits),
            "weights": {
                field.rpartition(".")[2]: network.weights and _hash(weights_file(network, field=field))
                for field, network in networks.items()
            },
        },
    }


class Progress:
    """How far a run is, and what of it is left, when it continues from a checkpoint with other numbers of steps.

    trained: steps by phase. Where a phase that is done gets more steps, it is `reopened`: those after it begin anew.
    faults: steps that cannot be had.
    """

    def __init__(self, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        self.steps: Mapping[str, int] = wanted["identity"]["steps"]
        before, now = _steps(stored, wanted), stored["phase"]
        at = PHASES.index(now)
        self.trained = dict.fromkeys(PHASES, 0) | {name: before.get(name, 0) for name in PHASES[:at]}
        self.trained[now] = stored["phase_step"]
        more = [name for name in PHASES[:at] if self.steps.get(name, 0) > self.trained[name]]
        self.reopened = next((name for name in more if self.trained[name]), None)
        self.faults = [f"{_steps_field(name)}: phase {now} has begun" for name in more if not self.trained[name]]
        if self.reopened is not None:
            self.trained |= dict.fromkeys(PHASES[PHASES.index(self.reopened) + 1 :], 0)
        for name, trained in self.trained.items():
            if (steps := self.steps.get(name, 0)) < trained:
                self.faults.append(f"{_steps_field(name)} = {steps} is fewer than the {trained} steps trained")

    def is_left(self, phase: str) -> bool:
        """Whether the phase has steps to do."""
        return self.steps.get(phase, 0) > self.trained[phase]

    @property
    def done(self) -> bool:
        """Whether every phase has ended."""
        return not any(map(self.is_left, PHASES))

    def why_not(self, rule: Rule, known: Mapping[str, Any]) -> str | None:
        """Why a field of this rule may not change; None: it may. known: the identity that the checkpoint keeps."""
        used = [name for name in rule.phases if self.trained[name] or self.is_left(name)]
        begun = [name for name in used if self.trained[name]]
        if rule.kind == "never" or (rule.kind == "content" and rule.by not in known):
            return "fixed for a run"
        if rule.kind == "unfinished" and used and not any(map(self.is_left, used)):
            return f"{_phases(used)} done"
        if rule.kind == "unbegun" and begun:
            return f"phase {begun[-1]} has begun"
        return None


@dataclass(frozen=True)
class Verdict:
    """On continuing from a checkpoint. changed: [old, new] by field. refused: what of it may not be, with the reason.

    reopened: the phase, done before, that has more steps now. done: nothing is left to do.
    """

    changed: dict[str, list[Any]]
    refused: list[str]
    reopened: str | None
    done: bool

    def notes(self) -> list[str]:
        """One line for each field that differs."""
        return [f"{field}: {json.dumps(old)} -> {json.dumps(new)}" for field, (old, new) in self.changed.items()]


def judge(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Verdict:
    """Compare what a checkpoint keeps with what a start asks for.

    Args:
        stored: the checkpoint's metadata; of earlier versions, without an identity.
        wanted: of `describe`.
    """
    progress, known = Progress(stored, wanted), stored.get("identity", {})
    changed = {name: [old, new] for name, old, new in differences(_fields(stored, known), _fields(wanted, known))}
    if f"{SECTION}.data.evaluate_on" in changed:  # these two change places
        changed = {name: both for name, both in changed.items() if name not in ("splits.test", "splits.held_out")}
    refused, others = list(progress.faults), [name for name in changed if name.startswith(("data.", "splits."))]
    for name, (old, new) in changed.items():
        rule = rule_of(name)  # none: a field that this version no longer has
        reason = None if rule is None else progress.why_not(rule, known)
        if rule == CONTENT and others:
            reason = f"with it, {others[0]} is another"
        if reason is not None:
            refused.append(f"{name}: {json.dumps(old)} -> {json.dumps(new)} ({reason})")
    return Verdict(changed, refused, progress.reopened, progress.done)


def refusal(folder: Path, refused: list[str]) -> ValueError:
    """The error for a start that a run does not allow. folder: of the run."""
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    return ValueError(
        f"{folder} holds a run that cannot continue with another configuration: {'; '.join(refused[:SHOWN])}{more}; "
        "begin a new run under another --output, or delete this one's checkpoints and use --resume never"
    )


def _fields(kept: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """All that is compared, nested: the configuration, and of the identity what the checkpoint knows."""
    identity = {name: value for name, value in kept.get("identity", {}).items() if name in known}
    found = {name: identity[name] for name in ("ranks", "batch", "distributions", "weights") if name in identity}
    if "max_steps" in identity:
        found["--max_steps"] = identity["max_steps"]
    if "manifest" in identity:
        found |= content({name: value for name, value in identity["manifest"].items() if name in known["manifest"]})
    return {**_normal(kept["config"]), **found}


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration, of an earlier version with this one's new fields at their defaults."""
    section = config[SECTION]
    try:
        valid = Config.model_validate_json(json.dumps(without_former_fields(section)))
    except ValueError:  # it has fields that are gone: compared as it stands
        pass
    else:
        section = valid.model_dump(mode="json")
    return {**settings_of({name: value for name, value in config.items() if name != SECTION}), SECTION: section}


def _steps(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Mapping[str, int]:
    """Steps of each phase in the checkpoint's run."""
    if "steps" in stored.get("identity", {}):
        return dict(stored["identity"]["steps"])
    phases, most = stored["config"][SECTION]["phases"], wanted["identity"]["max_steps"] or math.inf
    return {name: int(min(phases[name]["steps"], most)) for name in wanted["identity"]["steps"] if name in phases}


def _steps_field(phase: str) -> str:
    return f"{SECTION}.phases.{phase}.steps (or --max_steps)"


def _phases(names: list[str]) -> str:
    return f"phase {names[0]} is" if len(names) == 1 else f"phases {', '.join(names)} are"


def _hash(path: Path) -> str | None:
    """SHA-256 of a file; None where it cannot be read, which its user reports."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
