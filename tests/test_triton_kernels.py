"""The kernels that a GPU would run are compiled here to its machine code, by triton's own compiler and assembler."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpl_scale.models.kernels import Loops
from mpl_scale.optim import OPTIMIZERS


@pytest.mark.full
def test_every_loop_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    """sm_80 and sm_90: each loop of batch norm and each elementwise optimiser is at least one kernel of some size."""
    pytest.importorskip("triton", reason="needs triton, which comes with torch's CUDA builds")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.offline_triton", "80", "90"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    wanted = {field.name for field in dataclasses.fields(Loops)} - {"activation"}
    wanted |= {name for name, kind in OPTIMIZERS.items() if kind.elementwise}
    for architecture in (80, 90):
        assert {name for name, _, made_for, _ in rows if made_for == architecture} == wanted
    assert all(size > 1000 for *_, size in rows)
