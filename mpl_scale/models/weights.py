"""Weights outside a checkpoint: one model.safetensors with the model's own keys, as timm has them, in fp32.

Our batch norms have the config's eps, a published model's layers their own. y = (x - mean) / sqrt(var + eps) is kept by
moving the difference of the two eps into the variance; a variance may then be negative, var + eps never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.files import expanded
from mpl_scale.models.adapt import Shapes, adapt, pretrained_model
from mpl_scale.models.build import call_builder, find_classifier
from mpl_scale.models.hub import FILE_NAME, TIMM, find_file
from mpl_scale.models.registry import MODELS

_SHOWN = 3


def plain_model(network: NetworkConfig, shared: ModelConfig, *, field: str, device: str = "meta") -> nn.Module:
    """The model as its builder makes it: torch's layers, its own eps, no dropout of ours. field: for errors."""
    with torch.device(device):
        return call_builder(network, shared, field=field)


def to_plain(
    weights: Mapping[str, torch.Tensor], network: NetworkConfig, shared: ModelConfig, *, field: str
) -> dict[str, torch.Tensor]:
    """A network's parameters and buffers as its plain model takes them: fp32, only the keys it has."""
    plain = plain_model(network, shared, field=field)
    shifts = _variance_shifts(plain, shared.bn_eps)
    return {
        key: _shifted(weights[key].detach(), shifts.get(key, 0.0)).to(_dtype(like)).contiguous()
        for key, like in plain.state_dict().items()
    }


@dataclass(frozen=True)
class Fit:
    """How the tensors of `network.weights` meet the model's: shapes by key.

    Args:
        stored: in the file.
        given: as the model would be given them; others than stored where timm converts them (adapt.py).
        wanted: the model's own.
        replaced: keys of a classifier that keeps its initial values.
        differences: why the weights do not fit; empty: they do.
    """

    stored: Shapes
    given: Shapes
    wanted: Shapes
    replaced: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def is_adapted(self) -> bool:
        """Whether timm converts the file's tensors."""
        return self.given is not self.stored

    @property
    def loaded(self) -> list[str]:
        """Keys that are filled from the file."""
        return [key for key in self.given if key not in self.replaced]

    def parts(self) -> list[str]:
        """What was converted on the way, and what of the file is not used: a phrase each."""
        if not self.is_adapted:
            return []
        found: list[str] = []
        resampled: list[str] = []
        for key in self.loaded:
            old, new = self.stored.get(key, ()), self.given[key]
            if len(old) == len(new) == 4 and old[1] != new[1]:
                found.append(f"first convolution {key} adapted from {old[1]} to {new[1]} channels")
            elif old and old != new:
                kind = "position embedding " if "pos" in key else ""
                resampled.append(f"{kind}{key} resampled from {_by(old)} to {_by(new)}")
        more = f" and {len(resampled) - 1} more so" if len(resampled) > 1 else ""
        found += [f"{phrase}{more}" for phrase in resampled[:1]]
        if renamed := self.given.keys() - self.stored.keys():
            found.append(f"{len(renamed)} tensors renamed by timm")
        elif unused := sorted(self.stored.keys() - self.given.keys()):
            found.append(f"not used: {_some(unused)}")
        return found


def check_weights(network: NetworkConfig, shared: ModelConfig, *, field: str) -> None:
    """Compare keys and shapes of `network.weights`, if it is set, with the model's; from the header where timm can.

    Raises ValueError: no such file, not safetensors, or of another model; or a name of timm's that promises weights
    where none are set.
    """
    if network.weights is not None:
        _fitting(network, shared, field=field)
        return
    architecture, dot, tag = network.name.partition(".")
    if dot and architecture and not {"/", ":"} & set(network.name) and network.name not in MODELS:
        raise ValueError(
            f"{field}.name = {network.name!r}: .{tag} names weights of timm's, and {field}.weights is not set; set it "
            f"to {TIMM} or to a {FILE_NAME}, or set name = {architecture} to start without"
        )


def replaced_classifier(network: NetworkConfig, shared: ModelConfig, *, field: str) -> tuple[str, ...]:
    """Keys of the classifier if `network.weights` leave it as it was initialised (`new_classifier`), or nothing.

    Raises ValueError as `check_weights`.
    """
    return () if network.weights is None else _fitting(network, shared, field=field).replaced


def loading_note(network: NetworkConfig, shared: ModelConfig, *, field: str) -> str | None:
    """One line: what of `network.weights` is loaded, what is converted, what is not; None: no weights are set.

    Raises ValueError as `check_weights`.
    """
    if network.weights is None:
        return None
    fit = _fitting(network, shared, field=field)
    path = weights_file(network, field=field)
    named = f"{network.weights} ({path})" if network.weights == TIMM else network.weights
    said = [f"{len(fit.loaded)} of {len(fit.wanted)} tensors loaded", *fit.parts()]
    if fit.replaced:
        classes = fit.given.get(fit.replaced[0], (0,))[0]
        reason = "new_classifier = true" if network.new_classifier is True else f"of {classes} classes in the file"
        said.append(f"its classifier ({', '.join(fit.replaced)}; {reason}) starts untrained")
    return f"{field}.weights = {named}: {'; '.join(said)}"


def load_weights(module: nn.Module, network: NetworkConfig, shared: ModelConfig, *, field: str) -> None:
    """Fill a whole network built by `build_model` from `network.weights`. Raises as `check_weights` does."""
    fit = _fitting(network, shared, field=field)
    shifts = _variance_shifts(_plain_of(network, shared, field=field), shared.bn_eps)
    state = module.state_dict()
    with safe_open(weights_file(network, field=field), framework="pt") as file, torch.no_grad():
        read = file.get_tensor
        if fit.is_adapted:
            read = _adapted(file, network, shared, field=field).__getitem__
        for key in fit.loaded:
            state[key].copy_(_shifted(read(key), -shifts.get(key, 0.0)))


def _fitting(network: NetworkConfig, shared: ModelConfig, *, field: str) -> Fit:
    """The fit of weights that do fit. Raises ValueError as `check_weights`."""
    stored, model = _stored(network, field=field), _plain_of(network, shared, field=field)
    fit = _fit(stored, stored, model, network, shared, field=field)
    if fit.differences and network.name not in MODELS:
        try:
            given = _adapted_shapes(stored, network, shared, field=field)
        except Exception as error:  # timm's filters raise what comes of keys that they do not know
            why = f"timm cannot convert them ({type(error).__name__}: {error})".partition("\n")[0]
            fit = replace(fit, differences=(*fit.differences, why))
        else:
            fit = _fit(stored, given, model, network, shared, field=field)
    if fit.differences:
        raise ValueError(
            f"{field}.weights = {network.weights} is of another model than {field}.name = {network.name}: "
            f"{'; '.join(fit.differences)}; set the name, kwargs, num_classes and in_chans they were exported with"
        )
    return fit


def _fit(
    stored: Shapes, given: Shapes, model: nn.Module, network: NetworkConfig, shared: ModelConfig, *, field: str
) -> Fit:
    wanted = _shapes(model)
    replaced = _replaced(given, model, network, shared, field=field)
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}.union(replaced)
    differences = []
    for word, keys in (("missing", wanted.keys() - given.keys() - optional), ("unexpected", given.keys() - wanted)):
        if keys:
            differences.append(f"{word} {_some(sorted(keys))}")
    differences += [
        f"{key} is {list(given[key])}, the model has {list(wanted[key])}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key] != wanted[key] and key not in replaced
    ][:_SHOWN]
    return Fit(stored, given, wanted, replaced, tuple(differences))


def _replaced(
    found: Shapes, model: nn.Module, network: NetworkConfig, shared: ModelConfig, *, field: str
) -> tuple[str, ...]:
    """Keys of the classifier that stays new. found: shapes by key, of the weights."""
    if network.new_classifier is False:
        return ()
    wanted = _shapes(model)
    names = _classifiers(model)
    keys = tuple(key for key in wanted if key.startswith(tuple(f"{name}." for name in names)))
    if network.new_classifier is True and not keys:
        raise ValueError(
            f"{field}.new_classifier = true: {network.name} has no module `classifier`; name its last layer so"
        )
    if network.new_classifier is True or not any(key in found for key in keys):
        return keys
    classes = {found[key][:1] for key in keys if key in found}  # rows of weight and bias
    alike = all(key in found and found[key][1:] == wanted[key][1:] for key in keys)
    return keys if alike and len(classes) == 1 and classes != {(shared.num_classes,)} else ()


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the last linear layers: one, or those that timm names where there are several (DeiT); or none."""
    try:
        return (find_classifier(model)[0],)
    except (AttributeError, LookupError):  # several, or a model of the user's without get_classifier
        named: Any = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
        return (named,) if isinstance(named, str) else tuple(named)


def _adapted_shapes(stored: Shapes, network: NetworkConfig, shared: ModelConfig, *, field: str) -> Shapes:
    """What timm makes of the file, by its header; where a filter computes with values (numpy), by the file."""
    try:
        empty = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
        found = adapt(empty, network, shared, field=field, device="meta")
    except Exception:  # of any kind, from timm's filters: with the values the same error comes again, or none
        with safe_open(weights_file(network, field=field), framework="pt") as file:
            found = _adapted(file, network, shared, field=field)
    return {key: tuple(tensor.shape) for key, tensor in found.items()}


def _adapted(file: Any, network: NetworkConfig, shared: ModelConfig, *, field: str) -> dict[str, torch.Tensor]:
    state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return adapt(state, network, shared, field=field, device="cpu")


def _plain_of(network: NetworkConfig, shared: ModelConfig, *, field: str) -> nn.Module:
    """The model that the weights were trained as, on the meta device."""
    if network.weights == TIMM:
        return pretrained_model(network, shared, field=field)[0]
    return plain_model(network, shared, field=field)


def _stored(network: NetworkConfig, *, field: str) -> dict[str, tuple[int, ...]]:
    """Shapes by key, from the header of `network.weights`."""
    path = weights_file(network, field=field)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{field}.weights = {network.weights}: {path} cannot be read as safetensors ({error}); see mpl-scale export"
        ) from error


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _variance_shifts(plain: nn.Module, eps: float) -> dict[str, float]:
    """What to add to each running variance of a network with our eps, by key, so that the plain layer gives the same.

    Layers whose eps is ours are left out: their values stay bit for bit.
    """
    return {
        f"{name}.running_var": eps - layer.eps
        for name, layer in plain.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.eps != eps
    }


def _shifted(tensor: torch.Tensor, shift: float) -> torch.Tensor:
    return (tensor.double() + shift).to(tensor.dtype) if shift else tensor


def _dtype(like: torch.Tensor) -> torch.dtype:
    return torch.float32 if like.is_floating_point() else like.dtype


def weights_file(network: NetworkConfig, *, field: str) -> Path:
    """The file that `network.weights` names: itself, by its folder, or of timm's in the hub's cache, downloaded first.

    Raises ValueError: it is of timm's, and neither in the cache nor to be downloaded.
    """
    assert network.weights is not None
    if network.weights == TIMM:
        return find_file(network, field=field)
    path = expanded(network.weights)
    return path / FILE_NAME if path.is_dir() else path


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _some(names: list[str]) -> Any:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{names[:_SHOWN]}{more}"
