"""The jobs need a real Slurm: `make test-slurm` asks for them, `make test` runs only what needs none."""

import os

collect_ignore = [] if os.environ.get("MPL_SCALE_TEST_SLURM") else ["test_jobs.py"]
