"""Frozen parts of a network: `mpl_scale.model.<network>.frozen`, as timm's `freeze` leaves them.

Their parameters have no gradient, so they get no update, no weight decay, and no part in the feedback's inner products.
A frozen batch norm normalises by its running averages in training too, and they stay.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mpl_scale.config.names import suggest
from mpl_scale.models.batch_norm import BatchNorm


def freeze(model: nn.Module, frozen: Sequence[str], *, field: str) -> None:
    """Freeze parts of a model whose batch norms are ours.

    Args:
        model: changed in place.
        frozen: names of modules or parameters ("layer1", "blocks.0"), patterns of them ("blocks.*.attn"), or, where no
            module has that name, timm's names of groups of layers ("stem").
        field: of the setting, for errors.

    Raises:
        ValueError: a name that is of nothing in the model, with near ones; or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    chosen = {name for wanted in frozen for name in _matches(model, wanted, parameters, field=field)}
    if chosen and len(chosen) == len(parameters):
        raise ValueError(f"{field} = {list(frozen)} leaves no parameter to train; leave the classifier out")
    for name in chosen:
        parameters[name].requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.frozen = not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _matches(model: nn.Module, wanted: str, parameters: Iterable[str], *, field: str) -> set[str]:
    """The parameters that a name is of."""
    found = {name for name in parameters if _within(name, wanted)}
    groups = _groups(model)
    if not found and wanted in groups:
        found = {name for name in parameters if _group_of(name, groups) == wanted}
    if not found:
        paths = {name.rpartition(".")[0] for name in parameters} | set(parameters)
        known = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)} - {""}
        if not difflib.get_close_matches(wanted, known):
            known = {path.partition(".")[0] for path in paths if path} | set(groups)
        raise ValueError(f"{field}: {wanted!r} is no part of {type(model).__name__}; {suggest(wanted, known)}")
    return found


def _within(name: str, wanted: str) -> bool:
    """Whether a parameter is the one, or below the module, that a name or a pattern is of."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (wanted, f"{wanted}.*"))


def _groups(model: nn.Module) -> dict[str, list[str]]:
    """timm's groups of layers by name, as regular expressions of parameters, in their order."""
    matcher: Any = getattr(model, "group_matcher", None)
    groups = {} if matcher is None else matcher(coarse=False)
    if not isinstance(groups, dict):  # a function, which has no names
        return {}
    return {
        name: [given if isinstance(given, str) else given[0] for given in ([spec] if isinstance(spec, str) else spec)]
        for name, spec in groups.items()
        if spec is not None
    }


def _group_of(name: str, groups: dict[str, list[str]]) -> str | None:
    """The first group that has a parameter, as timm reads it."""
    return next((group for group, given in groups.items() if any(re.match(one, name) for one in given)), None)
