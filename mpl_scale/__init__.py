"""Large-scale Meta Pseudo Labels: teacher and student under ZeRO, one step, from a laptop to a cluster."""

__version__ = "0.1.0"
