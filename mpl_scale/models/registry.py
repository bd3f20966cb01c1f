"""Models by name: those registered here first, then every timm classifier."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mpl_scale.config.names import Registry, require_known

Builder = Callable[..., nn.Module]
MODELS: Registry[Builder] = Registry("model")
register_model = MODELS.register
"""Make a builder `(num_classes=..., **kwargs) -> module` available as `mpl_scale.model.<network>.name`."""


def find_builder(name: str, *, field: str) -> Builder:
    """The builder of a model.

    Args:
        name: a registered name or a timm architecture ("resnet50", "tf_efficientnet_l2").
        field: the config field that holds the name, for the error.

    Raises:
        ValueError: unknown, with the closest names.
    """
    if name in MODELS:
        return MODELS[name]
    if "/" in name or ":" in name:
        architecture = name.replace(":", "/").rpartition("/")[2].partition(".")[0]
        raise ValueError(
            f"{field} = {name!r} is a path or a model of a hub: give the architecture's name"
            f"{f', as {architecture}' if architecture else ''}, and as weights beside it timm or its model.safetensors"
        )
    import timm  # seconds, and only needed for its models

    if timm.is_model(name):
        return lambda **kwargs: timm.create_model(name, **kwargs)
    require_known(field, name, [*MODELS, *timm.list_models()])
    raise AssertionError(f"timm lists {name} but does not know it")
