"""What parameters of a network the optimiser treats alike: weight decay or none, and the rate of their layer.

Layer-wise decay of the rate is timm's (BEiT's): the model's own `group_matcher` numbers its layers from the input to
the classifier, and layer i of n has the rate lr decay^(n - 1 - i).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mpl_scale.config.schema import OptimConfig
from mpl_scale.optim.optimizers import OPTIMIZERS


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The groups of a module's parameters: first those with weight decay, then those without (BN's and biases: all 1-D
    tensors), each by falling rate. Parameters that need no gradient (`frozen`) are the last group, with the rate 0.

    Each group has `params`, `names`, `weight_decay`, `lr_scale`, which multiplies the rate, and `matrices`: whether
    they are `hidden_matrices`, where the rule has them apart.
    """
    hidden = hidden_matrices(module) if OPTIMIZERS[config.name].matrices_apart else set()
    scales = layer_scales(module, config.layer_decay, field="layer_decay")
    members: dict[tuple[bool, bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        trained = parameter.requires_grad
        decays = trained and (config.decay_bn_and_bias or parameter.ndim > 1)
        key = (decays, trained and name in hidden, scales[name] if trained else 0.0)
        members.setdefault(key, []).append((name, parameter))
    return [
        {
            "names": [name for name, _ in members[key]],
            "params": [parameter for _, parameter in members[key]],
            "weight_decay": config.weight_decay if key[0] else 0.0,
            "matrices": key[1],
            "lr_scale": key[2],
        }
        for key in sorted(members, reverse=True)
    ]


def layer_scales(module: nn.Module, decay: float, *, field: str) -> dict[str, float]:
    """What the rate of each parameter is multiplied by, by name.

    Raises ValueError with `field`: the rate is to decay, and the model does not say what its layers are.
    """
    names = [name for name, _ in module.named_parameters()]
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    matcher: Any = getattr(module, "group_matcher", None)
    layers: dict[str, int] = {}
    if matcher is not None:
        from timm.models import group_parameters  # seconds, but for a model of timm's

        layers = group_parameters(module, matcher(coarse=False), reverse=True)
    last = max(layers.values(), default=0)
    if not last:
        raise ValueError(
            f"{field} = {decay}: {type(module).__name__} has no group_matcher, which numbers the layers of timm's "
            "models; set 1, or give the class one"
        )
    return {name: decay ** (last - layers.get(name, last)) for name in names}


def hidden_matrices(module: nn.Module) -> set[str]:
    """The weights of hidden layers by name: of more than one dimension, but for the first layer's, which takes images,
    and the classifier's (timm's `get_classifier`, or the module `classifier`). Tables of positions are no weights.
    """
    find: Any = getattr(module, "get_classifier", None)
    head = find() if find else getattr(module, "classifier", None)
    heads = head if isinstance(head, tuple | list) else [head]
    of_heads = {id(p) for layer in heads if isinstance(layer, nn.Module) for p in layer.parameters()}
    weights = [name for name, p in module.named_parameters() if p.ndim > 1 and name.rpartition(".")[2] == "weight"]
    return {name for name in weights[1:] if id(module.get_parameter(name)) not in of_heads}
