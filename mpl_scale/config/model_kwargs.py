"""`model.<network>.kwargs` that a model's builder would obey but the trainer would undo, or never hear of."""

from __future__ import annotations

from collections.abc import Mapping

from mpl_scale.config.schema import ModelConfig

_WEIGHTS = "set {network}.weights to timm, or to a model.safetensors or the folder that holds it"
_DROPOUT = "set {network}.dropout: its masks are the same on any number of ranks"
_DROP_PATH = "set {network}.drop_path: its masks are the same on any number of ranks"
_IMAGES = "set mpl_scale.model.in_chans, for both networks"
_PRECISION = "set bf16.enabled, or remove it: weights are built in fp32 where they are trained"
REFUSED: Mapping[str, str] = {
    "pretrained": _WEIGHTS,
    "pretrained_cfg": _WEIGHTS,
    "pretrained_cfg_overlay": _WEIGHTS,
    "pretrained_strict": _WEIGHTS,
    "checkpoint_path": _WEIGHTS,
    "cache_dir": _WEIGHTS,
    "num_classes": "set mpl_scale.model.num_classes, for both networks",
    "in_chans": _IMAGES,
    "in_channels": _IMAGES,
    "drop_rate": _DROPOUT,
    "head_drop_rate": _DROPOUT,
    "drop_path_rate": _DROP_PATH,
    "drop_path": _DROP_PATH,
    "drop_connect_rate": _DROP_PATH,
    "drop_block_rate": "its masks would differ from rank to rank; set {network}.drop_path, or remove it",
    "bn_eps": "set mpl_scale.model.bn_eps, for both networks",
    "bn_momentum": "set mpl_scale.model.bn_decay, for both networks: it is 1 - momentum",
    "bn_tf": "set mpl_scale.model.bn_eps and bn_decay, for both networks",
    "features_only": "a classifier is trained; remove it",
    "device": "the launcher decides it; remove it",
    "dtype": _PRECISION,
}
"""What to do instead. {network}: the section's path."""


def refuse_kwargs(model: ModelConfig) -> None:
    """Raise ValueError for the first argument that a setting already covers, naming its value and that setting."""
    for name in ("teacher", "student"):
        section = f"mpl_scale.model.{name}"
        for key, value in getattr(model, name).kwargs.items():
            if key in REFUSED:
                raise ValueError(f"{section}.kwargs.{key} = {value!r}: {REFUSED[key].format(network=section)}")
