"""From a config to a network that is ready for an engine: built, initialised, its layers agreed over ranks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.frozen import freeze
from mpl_scale.models.kernels import Mode
from mpl_scale.models.layers import Dropout, DropoutLinear, DropPath, convert
from mpl_scale.models.passes import Passes
from mpl_scale.models.registry import MODELS, Builder, find_builder


def build_model(
    network: NetworkConfig,
    shared: ModelConfig,
    *,
    field: str,
    seed: int,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    kernels: Mode = "eager",
) -> nn.Module:
    """A classifier with `model.passes`, in training mode, initialised from `seed` alike on every rank.

    Args:
        network: the network's section.
        shared: what teacher and student share.
        field: path of the section, for errors, as "mpl_scale.model.teacher".
        seed: of the initial weights.
        group: ranks over which batch norm takes its statistics; None: this process.
        device: where it is built; "meta" builds shapes only.
        kernels: how batch norm with its activation is computed (kernels.py).
    """
    builder = find_builder(network.name, field=f"{field}.name")
    more = {}
    if network.drop_path and _takes("drop_path_rate", network, builder):
        more["drop_path_rate"] = network.drop_path
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = call_builder(network, shared, field=field, **more)
        _initialise(model, network, field=field)
    passes = Passes()
    model.passes = passes  # type: ignore[assignment]
    model.input_channels = shared.in_chans  # type: ignore[assignment]
    model = convert(model, passes=passes, group=group, kernels=kernels)
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            _set_statistics(layer, shared)
    if network.name not in MODELS:
        _drop_no_more_than(model, network)
    if network.dropout:
        _add_dropout(model, network.dropout, passes, field=field)
    if network.drop_path and not any(isinstance(layer, DropPath) for layer in model.modules()):
        raise ValueError(f"{field}.drop_path = {network.drop_path}: {network.name} has no residual path to drop; set 0")
    freeze(model, network.frozen, field=f"{field}.frozen")
    return model.train()


def channels_of(model: nn.Module) -> int:
    """Channels of the images that a network of `build_model` takes; RGB for one that was made otherwise."""
    found = getattr(model, "input_channels", 3)
    assert isinstance(found, int)
    return found


def call_builder(network: NetworkConfig, shared: ModelConfig, *, field: str, **more: Any) -> nn.Module:
    """The model as its builder returns it. more: arguments beside `network.kwargs`. ValueError: why there is none."""
    kwargs, builder = {**network.kwargs, **more}, find_builder(network.name, field=f"{field}.name")
    if shared.in_chans != 3 and _takes("in_chans", network, builder):
        kwargs["in_chans"] = shared.in_chans
    try:
        return builder(num_classes=shared.num_classes, **kwargs)
    except Exception as error:  # timm's builders raise what their layers do: KeyError, AssertionError, ...
        if isinstance(error, ValueError) and str(error).startswith(field):
            raise
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{field}.kwargs: {network.name} cannot be built with {kwargs}: {why}") from error


def _takes(argument: str, network: NetworkConfig, builder: Builder) -> bool:
    """Whether a registered builder has an argument; timm's have all."""
    return network.name not in MODELS or argument in inspect.signature(builder).parameters


@torch.no_grad()
def _set_statistics(layer: BatchNorm, shared: ModelConfig) -> None:
    """Our decay and eps. A builder may load trained weights: the difference of eps then goes into their variance, so
    that the layer gives the same (weights.py). A new layer's variance of 1 stays."""
    variance = layer.running_var
    if not variance.is_meta and not variance.eq(1).all():
        variance.copy_(variance.double() + (layer.eps - shared.bn_eps))
    layer.momentum, layer.eps = 1.0 - shared.bn_decay, shared.bn_eps


def _initialise(model: nn.Module, network: NetworkConfig, *, field: str) -> None:
    if network.init == "uniform":
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -network.init_range, network.init_range)
    elif network.init == "zero_classifier":
        for parameter in _classifier(model, f"{field}.init = zero_classifier")[1].parameters():
            nn.init.zeros_(parameter)


def find_classifier(model: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module of the last linear layer: timm's get_classifier, or `classifier`.

    Raises LookupError or AttributeError: there is none, or several.
    """
    find: Any = getattr(model, "get_classifier", None)
    head = find() if find else model.get_submodule("classifier")
    for name, module in model.named_modules():
        if module is head:
            return name, head
    raise LookupError(f"{type(model).__name__} has no single classifier")


def _classifier(model: nn.Module, setting: str) -> tuple[str, nn.Module]:
    try:
        return find_classifier(model)
    except (LookupError, AttributeError) as error:
        raise ValueError(f"{setting}: {error}; use the default") from error


def _drop_no_more_than(model: nn.Module, network: NetworkConfig) -> None:
    """Switch off what a timm model drops by default (GhostNet's classifier, Swin in depth): the settings decide."""
    rate = getattr(model, "drop_rate", 0.0)
    model.drop_rate = 0.0  # type: ignore[assignment]
    for layer in model.modules():
        if isinstance(layer, DropPath):
            if not network.drop_path:
                layer.p = layer.drop_prob = 0.0
        elif isinstance(layer, Dropout) and layer.p == rate:
            layer.p = 0.0


def _add_dropout(model: nn.Module, rate: float, passes: Passes, *, field: str) -> None:
    name, head = _classifier(model, f"{field}.dropout = {rate}")
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{field}.dropout = {rate}: the classifier is a {type(head).__name__}, not a Linear; set 0")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, DropoutLinear(head, rate, passes))
