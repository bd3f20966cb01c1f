"""Split a built model over the ranks of a width group, in place and in one order.

1. `trace` the layout at the run's resolution; refuse what has no partition rule.
2. Choose the stage to switch to batch split at, and trace again with it.
3. With block-input halos, move the exchanges of inverted bottlenecks to their inputs.
4. Swap the class of every layer in front of the switch for its split one. Names, parameters and buffers stay, so a
   checkpoint moves freely between split and unsplit.
5. Hook the comparison of the ranks' input shapes, the switch and the gather of the logits.

Recomputation, engines and graph capture come after it: rules go by class, and those wrap or swap classes.

Afterwards `model(x)` takes this rank's columns x [B, 3, H, W_r] of the whole batch of its width group and returns the
logits [B, classes] of that batch on every rank. Every rank must compute the whole loss and average parameter gradients
over ALL ranks (halo.py). The gradient of a rank's input slice is `width` times that of its group's loss.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from mpl_scale.mesh import Mesh
from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.passes import Passes
from mpl_scale.spatial.agreement import ShapeAgreement
from mpl_scale.spatial.expansion import keep_statistics, with_block_input
from mpl_scale.spatial.halo import Traffic, WidthGroup
from mpl_scale.spatial.layout import input_columns, slices
from mpl_scale.spatial.rules import SplitLayer, apply_rule
from mpl_scale.spatial.switch import Switch, choose_switch
from mpl_scale.spatial.trace import Layout, trace

Halo = Literal["plain", "block_input"]


def plan_layout(
    model: nn.Module, *, image_size: int, width: int, switch_at: str = "auto", halo: Halo = "plain"
) -> Layout:
    """Steps 1 to 3: the layout of a model that is not split yet, without a process group and without computing.

    Args: as of `parallelize`; width: ranks that share an image.
    """
    if halo not in ("plain", "block_input"):
        raise ValueError(f"halo = {halo!r}: use plain or block_input")
    layout = trace(model, image_size=image_size, width=width)
    switch = choose_switch(model, layout, switch_at)
    if switch is not None:
        layout = trace(model, image_size=image_size, width=width, switch=switch)
    return with_block_input(model, layout) if halo == "block_input" else layout


def refuse_empty_slices(layout: Layout) -> None:
    """ValueError, with the first path, where some rank enters a layer with no column at all."""
    for path, bounds in layout.entries.items():
        if any(start == stop for start, stop in slices(bounds)):
            raise ValueError(
                f"{path}: {bounds[-1]} columns leave some rank without one (mpl_scale.parallel.empty_slices = false); "
                "use a smaller width, larger images, or switch_at an earlier stage"
            )


def parallelize(
    model: nn.Module, *, mesh: Mesh, image_size: int, switch_at: str = "auto", halo: Halo = "plain"
) -> nn.Module:
    """Split `model` (in place; returned) over the ranks of `mesh.width_group`; a width of 1 leaves it untouched.

    Args:
        model: from `mpl_scale.models.build_model(..., group=mesh.world_group)`.
        mesh: this rank's place.
        image_size: height and width of the run's images, pixels; the split holds for this resolution alone.
        switch_at: the stage from which on the batch is split instead of the width: a path, `never`, or `auto`: where
            a rank would own fewer columns than the kernel has.
        halo: what convolutions of inverted bottlenecks exchange: their own input, or the block's (expansion.py).

    Raises:
        ValueError: more ranks than columns, a layer or operation without partition rule (with its path), no such stage.
    """
    if mesh.width == 1:
        return model
    assert mesh.width_group is not None
    if any(isinstance(module, SplitLayer) for module in model.modules()):
        raise ValueError("the model is split already; parallelize a model once, after build_model")
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.group is None:
            raise ValueError(f"{path}: batch norm without a group; build_model(..., group=mesh.world_group)")
    layout = plan_layout(model, image_size=image_size, width=mesh.width, switch_at=switch_at, halo=halo)
    ranks = WidthGroup(mesh.width_group, rank=mesh.width_index, size=mesh.width)
    for path, site in layout.sites.items():
        module = model.get_submodule(path)
        if site.split.held is not None and isinstance(module, BatchNorm):
            keep_statistics(module, split=site.split, ranks=ranks)
        apply_rule(module, split=site.split, ranks=ranks, path=path)
    for path in layout.replicated:
        norm = model.get_submodule(path)
        assert isinstance(norm, BatchNorm)
        norm.replicas = mesh.width
    if layout.switch is not None:
        passes = model.passes
        assert isinstance(passes, Passes), "the model does not come from build_model"
        switch = Switch(columns=layout.entries[layout.switch], ranks=ranks, passes=passes)
        switch.install(model, model.get_submodule(layout.switch))
    columns = [stop - start for start, stop in input_columns(image_size, mesh.width)]
    model.register_forward_pre_hook(ShapeAgreement(columns=columns, ranks=ranks))
    model.spatial_traffic = ranks.traffic  # type: ignore[assignment]
    return model


def traffic(model: nn.Module) -> Traffic:
    """The counter of messages and bytes that a split model's rank sent in exchanges and switches."""
    counter = model.spatial_traffic
    assert isinstance(counter, Traffic)
    return counter
