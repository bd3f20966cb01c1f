"""Weights outside a checkpoint: one model.safetensors with the model's own keys, as timm has them, in fp32.

Our batch norms have the config's eps, a published model's layers their own. y = (x - mean) / sqrt(var + eps) is kept by
moving the difference of the two eps into the variance; a variance may then be negative, var + eps never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.files import expanded
from mpl_scale.models.build import call_builder, find_classifier
from mpl_scale.models.registry import MODELS

FILE_NAME = "model.safetensors"
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


def check_weights(network: NetworkConfig, shared: ModelConfig, *, field: str) -> None:
    """Compare keys and shapes of `network.weights`, if it is set, with the model's; reads the header alone.

    Raises ValueError: no such file, not safetensors, or of another model; or a name of timm's that promises weights
    where none are set.
    """
    architecture, dot, tag = network.name.partition(".")
    if network.weights is None:
        if dot and architecture and not {"/", ":"} & set(network.name) and network.name not in MODELS:
            raise ValueError(
                f"{field}.name = {network.name!r}: .{tag} names weights of timm's, which are not downloaded; set name "
                f"= {architecture} and {field}.weights to their model.safetensors"
            )
        return
    named = f"{field}.weights = {network.weights}"
    found, wanted = _stored(network, field=field), _shapes(plain_model(network, shared, field=field))
    replaced = replaced_classifier(network, shared, field=field)
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}.union(replaced)
    differences = []
    for word, keys in (("missing", wanted.keys() - found.keys() - optional), ("unexpected", found.keys() - wanted)):
        if keys:
            differences.append(f"{word} {_some(sorted(keys))}")
    differences += [
        f"{key} is {list(found[key])}, the model has {list(wanted[key])}"
        for key in sorted(wanted.keys() & found.keys())
        if found[key] != wanted[key] and key not in replaced
    ][:_SHOWN]
    if differences:
        raise ValueError(
            f"{named} is of another model than {field}.name = {network.name}: {'; '.join(differences)}; set the name, "
            "kwargs and num_classes it was exported with"
        )


def replaced_classifier(network: NetworkConfig, shared: ModelConfig, *, field: str) -> tuple[str, ...]:
    """Keys of the classifier if `network.weights` leave it as it was initialised (`new_classifier`), or nothing.

    Raises ValueError: the weights cannot be read, or new_classifier = true and the model has no known classifier.
    """
    if network.weights is None or network.new_classifier is False:
        return ()
    found, model = _stored(network, field=field), plain_model(network, shared, field=field)
    wanted = _shapes(model)
    try:
        name, _ = find_classifier(model)
    except (AttributeError, LookupError):  # a model of the user's, without get_classifier
        name = ""
    keys = tuple(key for key in wanted if name and key.startswith(f"{name}."))
    if network.new_classifier is True:
        if not keys:
            raise ValueError(
                f"{field}.new_classifier = true: {network.name} has no module `classifier`; name its last layer so"
            )
        return keys
    classes = {found[key][:1] for key in keys if key in found}  # rows of weight and bias
    alike = all(key in found and found[key][1:] == wanted[key][1:] for key in keys)
    return keys if alike and len(classes) == 1 and classes != {(shared.num_classes,)} else ()


def classifier_warning(network: NetworkConfig, shared: ModelConfig, *, field: str) -> str | None:
    """A warning where the file's classifier is not loaded; None: it is loaded, or there is no file yet."""
    if network.weights is None or not weights_file(network.weights).exists():
        return None
    replaced = replaced_classifier(network, shared, field=field)
    if not replaced:
        return None
    shape = _stored(network, field=field).get(replaced[0], ())
    reason = (
        f"new_classifier = true with {field}.weights"
        if network.new_classifier is True
        else f"weights = {network.weights} are of {shape[0]} classes, not mpl_scale.model.num_classes = "
        f"{shared.num_classes}"
    )
    return f"{field}.{reason}: its classifier ({', '.join(replaced)}) starts untrained"


def load_weights(module: nn.Module, network: NetworkConfig, shared: ModelConfig, *, field: str) -> None:
    """Fill a whole network built by `build_model` from `network.weights`. Raises as `check_weights` does."""
    assert network.weights is not None
    check_weights(network, shared, field=field)
    replaced = replaced_classifier(network, shared, field=field)
    shifts = _variance_shifts(plain_model(network, shared, field=field), shared.bn_eps)
    state = module.state_dict()
    with safe_open(weights_file(network.weights), framework="pt") as file, torch.no_grad():
        for key in set(file.keys()) - set(replaced):
            state[key].copy_(_shifted(file.get_tensor(key), -shifts.get(key, 0.0)))


def _stored(network: NetworkConfig, *, field: str) -> dict[str, tuple[int, ...]]:
    """Shapes by key, from the header of `network.weights`."""
    assert network.weights is not None
    path = weights_file(network.weights)
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


def weights_file(weights: str) -> Path:
    """The file that `network.weights` names, itself or by its folder."""
    path = expanded(weights)
    return path / FILE_NAME if path.is_dir() else path


def _some(names: list[str]) -> Any:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{names[:_SHOWN]}{more}"
