"""What a width partition costs, from the layout alone: widths, halos, hops, messages and bytes per stage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.models import build_model
from mpl_scale.spatial.layout import Bounds, hops, slices
from mpl_scale.spatial.layout import halo as widest_halo
from mpl_scale.spatial.parallelize import Halo, plan_layout
from mpl_scale.spatial.switch import stages
from mpl_scale.spatial.trace import Layout, Site


@dataclass(frozen=True)
class StageRow:
    """One stage. Messages and bytes are those that the busiest rank sends, per image of the group's batch."""

    stage: str
    columns: tuple[int, ...]  # whole widths, input first
    local: tuple[int, ...]  # the widest slice of each
    windows: tuple[tuple[str, int], ...]  # ("kernel/stride", how many)
    halo: tuple[int, int]  # widest, left and right, columns
    hops: int
    exchanges: int  # forward and backward
    messages: int
    bytes: int

    def __str__(self) -> str:
        windows = ", ".join(f"{window} x{count}" for window, count in self.windows)
        cells = ("->".join(map(str, self.columns)), "->".join(map(str, self.local)), windows)
        sides = ",".join(map(str, self.halo))
        counts = f"{self.hops:>4} {self.exchanges:>9} {self.messages:>8} {self.bytes:>12}"
        return f"{self.stage:<14} {cells[0]:<12} {cells[1]:<8} {cells[2]:<28} {sides:<5} {counts}"


@dataclass(frozen=True)
class PartitionTable:
    """The table of one network at one resolution and width."""

    rows: tuple[StageRow, ...]
    switch: str | None

    @property
    def exchanges(self) -> int:
        """Collectives of the exchanges in one forward and backward."""
        return sum(row.exchanges for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes that the busiest rank sends per image of the group's batch, forward and backward."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        header = (
            f"{'stage':<14} {'width':<12} {'local':<8} {'kernel/stride':<28} {'halo':<5}"
            f" {'hops':>4} {'exchanges':>9} {'messages':>8} {'bytes/image':>12}"
        )
        total = f"total: {self.exchanges} exchanges, {self.bytes} bytes per image sent by the busiest rank"
        return "\n".join([header, *map(str, self.rows), f"{total}, forward and backward"])


def partition_table(
    model: str | nn.Module,
    *,
    image_size: int,
    width: int,
    switch_at: str = "never",
    halo: Halo = "plain",
    element_bytes: int = 2,
) -> PartitionTable:
    """What the width partition of a network costs per stage; needs no weights and no ranks.

    Args:
        model: a registered or timm name, or what `build_model` returned.
        image_size: pixels.
        width: ranks that share an image.
        switch_at, halo: as of `parallelize`.
        element_bytes: of an activation; 2 for bf16.

    Raises:
        ValueError: the network cannot be split, and why.
    """
    if isinstance(model, str):
        network = NetworkConfig(name=model)
        shared = ModelConfig(teacher=network, student=network, num_classes=1000, image_size=image_size)
        model = build_model(network, shared, field="model", seed=0, device="meta")
    layout = plan_layout(model, image_size=image_size, width=width, switch_at=switch_at, halo=halo)
    names = stages(model, layout)
    groups: dict[str, list[Site]] = {name: [] for name in names}
    for path, site in layout.sites.items():
        stage = next((name for name in names if path == name or path.startswith(f"{name}.")), None)
        if stage is not None:
            groups[stage].append(site)
    image = next((site.path for site in layout.sites.values()), "")
    rows = [_row(name, sites, image, element_bytes) for name, sites in groups.items() if _worth_a_row(sites)]
    if layout.switch is not None:
        rows.append(_switch_row(layout, element_bytes))
    return PartitionTable(tuple(rows), layout.switch)


def _worth_a_row(sites: list[Site]) -> bool:
    return any(site.split.window is not None and site.split.window.extent > 1 for site in sites)


def _row(stage: str, sites: list[Site], image: str, element_bytes: int) -> StageRow:
    kernels: Counter[str] = Counter()
    bounds: dict[Bounds, None] = {}  # an ordered set
    exchanges, messages, volume, reach = 0, 0, 0, [(0, 0, 0)]
    for site in sites:
        split = site.split
        window = split.window
        if window is not None and window.extent > 1:
            kernels[f"{window.extent}/{window.stride}"] += 1
            bounds.update({owner: None for owner in (split.inputs, split.outputs) if owner})
        sent = split.messages()
        if not sent:
            continue
        assert split.reads is not None
        passes = 1 if site.path == image else 2  # images need no gradient
        busiest = [sum(count for (source, _), count in sent.items() if source == r) for r in range(len(split.reads))]
        parts = [sum(source == r for source, _ in sent) for r in range(len(split.reads))]
        exchanges += passes
        messages += passes * max(parts)
        volume += passes * max(busiest) * site.channels * site.height * element_bytes
        reach.append((*widest_halo(split.inputs, split.reads), hops(split.inputs, split.reads)))
    return StageRow(
        stage=stage,
        columns=tuple(owner[-1] for owner in bounds),
        local=tuple(max(stop - start for start, stop in slices(owner)) for owner in bounds),
        windows=tuple(kernels.items()),
        halo=(max(left for left, _, _ in reach), max(right for _, right, _ in reach)),
        hops=max(far for _, _, far in reach),
        exchanges=exchanges,
        messages=messages,
        bytes=volume,
    )


def _switch_row(layout: Layout, element_bytes: int) -> StageRow:
    """The all-to-all at the switch: all of an image's columns but those of the rank that takes it."""
    assert layout.switch is not None
    owner = layout.entries[layout.switch]
    channels, height = layout.shapes[layout.switch]
    local = max(stop - start for start, stop in slices(owner))
    elements = channels * height * local * (layout.width - 1) // layout.width
    return StageRow(
        stage=f"at {layout.switch}",
        columns=(owner[-1],),
        local=(local,),
        windows=(("to rows", 1),),
        halo=(0, 0),
        hops=layout.width - 1,
        exchanges=2,
        messages=2 * (layout.width - 1),
        bytes=2 * elements * element_bytes,
    )
