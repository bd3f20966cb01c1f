"""Weights of a timm model that was built for other images, converted by timm's own functions.

Position embeddings and tables of relative positions are resampled (each family's checkpoint filter), first convolutions
take another number of channels (timm.models.adapt_input_conv). The same functions run on meta tensors, so a file's
header tells the shapes that come of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.models.build import call_builder

Shapes = Mapping[str, tuple[int, ...]]
Filter = Callable[..., dict[str, torch.Tensor]]


def pretrained_model(
    network: NetworkConfig, shared: ModelConfig, *, field: str, device: str = "meta"
) -> tuple[nn.Module, Filter | None]:
    """A timm model as it is built for trained weights (some have another eps then), which are not loaded; its filter.

    A filter is known only to the function that builds a model, which hands it to `load_pretrained`.
    """
    from timm.models import _builder

    filters: list[Filter | None] = []
    load = _builder.load_pretrained
    _builder.load_pretrained = lambda model, *, filter_fn=None, **_: filters.append(filter_fn)
    try:
        with torch.device(device):
            model = call_builder(network, shared, field=field, pretrained=True)
    finally:
        _builder.load_pretrained = load
    return model, filters[-1] if filters else None


def adapt(
    state: Mapping[str, torch.Tensor], network: NetworkConfig, shared: ModelConfig, *, field: str, device: str
) -> dict[str, torch.Tensor]:
    """Tensors by the model's keys, of those of a file, as timm would load them into the model; the classifier's stay.

    device: that of the tensors, "meta" for shapes alone. Raises what timm's functions do, whatever that is, where the
    weights are of another model.
    """
    from timm.models import load_pretrained

    model, convert = pretrained_model(network, shared, field=field, device=device)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    channels = _channels({key: tuple(tensor.shape) for key, tensor in state.items()}, wanted, shared.in_chans)
    found: dict[str, torch.Tensor] = {}

    def keep(converted: Mapping[str, torch.Tensor], **_: Any) -> Any:
        found.update(converted)
        return nn.modules.module._IncompatibleKeys([], [])

    model.load_state_dict = keep  # type: ignore[assignment, method-assign]
    known: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    described = (
        known
        | {
            "state_dict": dict(state),
            "num_classes": shared.num_classes,  # timm would drop a classifier of another number
            "input_size": (channels, *known["input_size"][1:]),
        }
    )
    with torch.device(device):
        load_pretrained(model, described, num_classes=shared.num_classes, in_chans=shared.in_chans, filter_fn=convert)
    return found


def _channels(stored: Shapes, wanted: Shapes, in_chans: int) -> int:
    """Channels of the images that the weights were trained on.

    Of convolutions that read the images, dim 1 is a multiple of that (of a stem that folds pixels into channels).
    """
    found = set()
    for key, shape in stored.items():
        own = wanted.get(key, ())
        if len(shape) == len(own) == 4 and shape[0] == own[0] and shape[1] != own[1]:
            found.add(shape[1] * in_chans // own[1])
    return found.pop() if len(found) == 1 else in_chans
