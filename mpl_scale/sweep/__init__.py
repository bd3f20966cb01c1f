"""Random search over settings, then the best of them on several seeds: the paper's tuning protocol.

A sweep is a folder. Every trial's configuration is written there before any trial runs, and each trial is a run like
any other, so a sweep is resumed, spread over machines and reported by what already does that for runs.
"""

from mpl_scale.sweep.folder import State, Sweep, Task
from mpl_scale.sweep.spec import Spec, read_spec

__all__ = ["Spec", "State", "Sweep", "Task", "read_spec"]
