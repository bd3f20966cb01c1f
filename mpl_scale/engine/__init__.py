"""ZeRO engines behind one interface: `flat` (static buffers, capturable) and `deepspeed` (stages 0-3, offload)."""

from mpl_scale.engine.build import build_network

__all__ = ["build_network"]
