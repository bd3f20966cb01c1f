"""Under `pytest -n 2 --dist loadgroup`: what starts local ranks or whole runs goes to one worker, one after another.

The rank pools (ranks.py) exist once per worker and cost gigabytes, and two launches at a time would only wait for each
other's cores. All other tests fill the second worker.

One thread a process: threads of several that wait for each other's cores make small networks 20 times slower.
"""

from __future__ import annotations

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in what tests start

LAUNCHING = {
    "test_launch",
    "test_resume",
    "test_bad_input",
    "test_benchmarks",
    "test_stop",
    "test_split_command",
    "test_docs",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = getattr(item, "module", None)
        if module is not None and (hasattr(module, "pool") or module.__name__.rpartition(".")[2] in LAUNCHING):
            item.add_marker(pytest.mark.xdist_group("ranks"))
