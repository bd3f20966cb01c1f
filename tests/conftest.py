"""One thread a process: threads of several that wait for each other's cores make small networks 20 times slower."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in what tests start
