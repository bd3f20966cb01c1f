"""DeepSpeed's half of a ds_config, checked whatever the engine: names, types, ranges, and what has no effect here.

DeepSpeed passes over unknown top-level keys and coerces values; the flat engine reads a few keys only. So neither may
decide what is valid: the tables in deepspeed_keys.py do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpl_scale.config.deepspeed_keys import AUTO_FROM_BATCH, SECTIONS, STAGE_3, TOP_LEVEL, Key
from mpl_scale.config.names import suggest


def validated(raw: Mapping[str, Any], *, path: Path, known_beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """DeepSpeed's half without the values "auto" that are known: those of the batch equation, and DeepSpeed's tuning.

    Args:
        raw: the file without the "mpl_scale" section.
        path: of the file, for errors.
        known_beside: other names of the top level, to suggest for a misspelt one.

    Raises:
        ValueError: the field, its value and the fix.
    """
    known = {*TOP_LEVEL, *(name for name in SECTIONS if "." not in name)}
    for name in raw:
        if name not in known:
            raise ValueError(f'{path}: unknown key "{name}"; {suggest(name, {*known, *known_beside})}')
    found = _without_auto(raw, path)
    for where, keys in SECTIONS.items():
        section = _section(found, where)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ValueError(f"{path}: {where} = {section!r}: must be a section {{...}}")
        for name in section:
            if name not in keys:
                raise ValueError(f'{path}: unknown key "{where}.{name}"; {suggest(name, keys)}')
    refused = []
    for field, key, value in _set_keys(found):
        if key.effect == "refused":
            refused.append(f"{field}: {key.why}")
        elif fault := key.fault(value):
            raise ValueError(f"{path}: {field} = {value!r}: {fault}")
    if refused:
        raise ValueError(f"{path}: {'; '.join(refused)}")
    return found


def refuse_without_effect(deepspeed: Mapping[str, Any], *, flat: bool) -> None:
    """ValueError for keys that change what is computed or kept, and that the flat engine does not have."""
    unheard = [field for field, key, _ in _set_keys(deepspeed) if key.effect == "engine"] if flat else []
    if unheard:
        them = "it" if len(unheard) == 1 else "them"
        raise ValueError(
            f"{', '.join(unheard)}: this run uses engine flat, and only engine deepspeed honours {them}; "
            f"set mpl_scale.parallel.engine = deepspeed, or remove {them}"
        )


def refuse_combinations(deepspeed: Mapping[str, Any], *, shard_size: int, world: int) -> None:
    """What engine deepspeed would ignore, fail on late, or get wrong in a step of two networks.

    Args:
        deepspeed: validated.
        shard_size: consecutive ranks that share one copy of the state.
        world: ranks.

    Raises:
        ValueError: the field, its value, the reason and the fix.
    """
    zero = deepspeed.get("zero_optimization", {})
    stage, replicated = zero.get("stage", 0), shard_size < world
    offload, offload_param = (zero.get(f"offload_{kind}") or {} for kind in ("optimizer", "param"))
    offloads = offload.get("device", "none") != "none"
    shards = f"mpl_scale.parallel.shard_size = {shard_size} of {world} ranks"
    for refused, message in (
        (
            stage == 0 and replicated,
            f"{shards} shards the state, zero_optimization.stage = 0 does not; use stage 1, 2 or 3",
        ),
        (
            offloads and replicated,
            f"{shards}: with zero_optimization.offload_optimizer the gradient's norm is taken before replicas are "
            "averaged; remove one of the two",
        ),
        (offloads and stage == 0, "zero_optimization.offload_optimizer: stage 0 ignores it; use stage 1, 2 or 3"),
        (
            stage != 3 and offload_param.get("device", "none") != "none",
            f"zero_optimization.offload_param: stage {stage} ignores it; use stage 3",
        ),
        (
            "nvme" in (offload.get("device"), offload_param.get("device")),
            "zero_optimization.offload_* to nvme: checkpoints and the EMA read the master weights in memory; use cpu",
        ),
        (
            offload.get("ratio", 1.0) < 1.0 or offload.get("super_offload"),
            "zero_optimization.offload_optimizer.ratio < 1 and super_offload need DeepSpeedCPUAdam; remove them",
        ),
    ):
        if refused:
            raise ValueError(message)


def without_effect(deepspeed: Mapping[str, Any], *, flat: bool) -> list[str]:
    """One line for each group of keys that this run ignores without harm."""
    ignored = [field for field, key, _ in _set_keys(deepspeed) if key.effect == "ignored"]
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    of_stage_3 = [
        field
        for field, key, _ in _set_keys(deepspeed)
        if stage != 3 and key.effect == "tuning" and field.rpartition(".")[2].removeprefix("stage3_") in STAGE_3
    ]
    tuning = [field for field, key, _ in _set_keys(deepspeed) if key.effect == "tuning"] if flat else []
    tuning = [field for field in tuning if field not in of_stage_3]
    lines = []
    if (clipping := deepspeed.get("gradient_clipping", 0)) < 0:
        lines.append(
            f"gradient_clipping = {clipping}: below 0, so gradients are not clipped, as in DeepSpeed; write 0.0"
        )
    if ignored:
        lines.append(f"{', '.join(ignored)}: no effect here; docs/troubleshooting.md has the list")
    if of_stage_3:
        lines.append(f"{', '.join(of_stage_3)}: no effect with zero_optimization.stage = {stage}; stage 3 reads them")
    if tuning:
        lines.append(f"{', '.join(tuning)}: no effect with engine flat, which has no such buffers")
    return lines


def settings_of(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that asks for something, by dotted field: a default that is written out is the same as none."""
    return {field: value for field, _, value in _set_keys(deepspeed)}


def _set_keys(deepspeed: Mapping[str, Any]) -> Iterator[tuple[str, Key, Any]]:
    """The path, key and value of everything that asks for something."""
    for name, key in TOP_LEVEL.items():
        if name in deepspeed and _asks(key, deepspeed[name]):
            yield name, key, deepspeed[name]
    for section, keys in SECTIONS.items():
        values = _section(deepspeed, section)
        if isinstance(values, Mapping) and values.get("enabled") is not False:
            for name, key in keys.items():
                if name in values and _asks(key, values[name]):
                    yield f"{section}.{name}", key, values[name]


def _asks(key: Key, value: Any) -> bool:
    """Whether a value is something else than DeepSpeed's default, or than off."""
    if key.kind == "section" and isinstance(value, Mapping):
        return value.get("enabled") is not False and value.get("device") != "none"
    return type(value) is not type(key.default) or value != key.default


def _section(deepspeed: Mapping[str, Any], name: str) -> Any:
    found: Any = deepspeed
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _without_auto(raw: Mapping[str, Any], path: Path, *, inside: str = "") -> dict[str, Any]:
    """A copy without what the trainer knows; ValueError for an "auto" that only Hugging Face's Trainer can fill in."""
    found: dict[str, Any] = {}
    for name, value in raw.items():
        field = f"{inside}.{name}" if inside else name
        key = SECTIONS.get(inside, {}).get(name) if inside else TOP_LEVEL.get(name)
        if value is None and (field in SECTIONS or (key is not None and key.default is None)):
            continue  # null: not given
        if isinstance(value, float) and key is not None and key.kind == "whole" and value.is_integer():
            found[name] = int(value)  # 5e8 is a float in JSON
        elif isinstance(value, Mapping):
            found[name] = _without_auto(value, path, inside=field) if field in SECTIONS else value
        elif value != "auto" or (key is not None and key.effect == "refused"):
            found[name] = value
        elif key is None or not (key.effect == "tuning" or field in AUTO_FROM_BATCH):
            raise ValueError(f'{path}: {field} = "auto": only Hugging Face\'s Trainer fills it in; write the value')
    return found
