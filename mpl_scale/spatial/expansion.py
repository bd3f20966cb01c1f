"""Block-input halos: exchange the narrow input of an inverted bottleneck and recompute its expansion on halo columns.

    plain:        conv 1x1 (C -> 6 C), norm, [exchange 6 C channels], depthwise k x k
    block_input:  [exchange C channels], conv 1x1 on own and halo columns, norm, depthwise k x k

Up to six times fewer bytes for (k - 1) more columns through the expansion. Statistics of batch norm leave the halo
columns out, else each would count on two ranks.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.spatial.halo import WidthGroup
from mpl_scale.spatial.layout import Share, slices
from mpl_scale.spatial.rules import Split, class_name
from mpl_scale.spatial.trace import Layout

EXPANSIONS: dict[str, tuple[str, str, str]] = {
    "timm.models._efficientnet_blocks.InvertedResidual": ("conv_pw", "bn1", "conv_dw"),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": ("pw_exp.conv", "pw_exp.bn", "dw_mid.conv"),
}
"""Block class -> its expansion, the norm behind it and the layer whose halo they can serve, in running order."""


def with_block_input(model: nn.Module, layout: Layout) -> Layout:
    """The layout in which every registered block exchanges its input, where that is narrower than its expansion."""
    sites = dict(layout.sites)
    for path, block in model.named_modules():
        if class_name(block) not in EXPANSIONS:
            continue
        names = [f"{path}.{name}" for name in EXPANSIONS[class_name(block)]]
        if any(name not in sites for name in names):  # behind the switch, or a block without one of them
            continue
        expand, norm, depthwise = (sites[name] for name in names)
        window = expand.split.window
        pointwise = window is not None and (window.kernel, window.stride) == (1, 1)
        if not pointwise or not depthwise.split.messages() or expand.channels >= depthwise.channels:
            continue
        if not isinstance(model.get_submodule(norm.path), BatchNorm) or norm.split.inputs != depthwise.split.inputs:
            continue
        held = _held(depthwise.split)
        reads = tuple(replace(share, pad_left=int(share.start == share.stop)) for share in held)
        sites[expand.path] = replace(expand, split=replace(expand.split, reads=reads, expands=True))
        sites[norm.path] = replace(norm, split=replace(norm.split, held=held))
        sites[depthwise.path] = replace(depthwise, split=replace(depthwise.split, held=held))
    return replace(layout, sites=sites)


def _held(split: Split) -> tuple[Share, ...]:
    """The columns that each rank must hold: its own, for the statistics, and those that the layer reads."""
    assert split.reads is not None
    found = []
    for (start, stop), share in zip(slices(split.inputs), split.reads, strict=True):
        spans = [span for span in ((start, stop), (share.start, share.stop)) if span[1] > span[0]]
        found.append(Share(min((a for a, _ in spans), default=start), max((b for _, b in spans), default=start)))
    return tuple(found)


def keep_statistics(norm: BatchNorm, *, split: Split, ranks: WidthGroup) -> None:
    """Batch norm over own and halo columns takes its statistics from its own columns."""
    assert split.held is not None
    (start, stop), held = slices(split.inputs)[ranks.rank], split.held[ranks.rank]
    norm.statistics_columns = (start - held.start if stop > start else 0, stop - start)
