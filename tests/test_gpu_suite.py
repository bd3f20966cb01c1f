"""benchmarks.gpu_suite at toy size: its parts, and what becomes of one that fails, dies or does not end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import engines, memory
from benchmarks.gpu.parts import Part, Setting, preload, run_here
from benchmarks.gpu.shown import shown
from tests.support.tiers import full

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"real_run", "two_ranks"}
"""Parts that start processes: make test-docs runs them, with all others, through make bench-gpu."""
HERE = [part for module in gpu_suite.MODULES for part in module.parts(tiny=True) if part.name not in ELSEWHERE]

REPEATED = ("largest_bn_act_live", "largest_block_live", "largest_block_deferred")
"""As largest_none_live, with other policies."""


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return Setting(device="cpu", tiny=True, rounds=2, turn=0.01, limit=2, seconds=100.0, folder=tmp_path)


@pytest.mark.parametrize(
    "part", [full(part) if part.name in REPEATED else part for part in HERE], ids=lambda part: part.name
)
def test_a_part_runs(part: Part, setting: Setting) -> None:
    result = run_here(part, setting)
    assert not {"error", "skipped"} & result.keys()
    assert not result.get("failures")
    assert shown(result) != "done"  # the terminal and docs/performance.md say something of it
    CHECKS.get(part.name.split("_")[0], lambda result: None)(json.loads(json.dumps(result)))


def check_step(result: dict[str, Any]) -> None:
    assert set(result["rows"]) == {"reference", "eager", "plain", "graph"}
    case = result["case"]
    for row in result["rows"].values():
        seconds = case["labelled"] * (1 + case["mu"]) / row["images_per_second"]
        assert row["mfu"] == pytest.approx(result["flops_per_step"] / seconds / (result["peak_tflops"] * 1e12))


def check_kernels(result: dict[str, Any]) -> None:
    assert {"convolution_and_matrix_product", "batch_norm", "elementwise"} <= result["ms_per_step"].keys()


def check_memory(result: dict[str, Any]) -> None:
    rows = [result["memory"][policy] for policy in memory.POLICIES]
    kept = [row["kept_bytes_per_image_bf16"] for row in rows]
    assert kept == sorted(kept, reverse=True)
    for row in rows:
        assert row["bytes"]["activations"]["planned"] == row["bytes"]["activations"]["measured"]


def check_largest(result: dict[str, Any]) -> None:
    assert result["largest_labelled"] == 2  # --limit


def check_decode(result: dict[str, Any]) -> None:
    assert [row["bitwise_equal"] for row in result["decoding"].values() if row["bitwise_promised"]] == [True]


def check_deepspeed(result: dict[str, Any]) -> None:
    assert set(result["time_ratios"]) == {"flat", "stage 1", "stage 2", "stage 3"}
    assert min(result["changes_of_flat"].values()) > 0
    for networks in result["differences_from_flat"].values():
        assert max(networks.values()) < 1e-6  # fp32: three steps of roundings of 6e-8


CHECKS = {
    "step": check_step,
    "kernels": check_kernels,
    "memory": check_memory,
    "largest": check_largest,
    "decode": check_decode,
    "deepspeed": check_deepspeed,
}


def good(setting: Setting) -> dict[str, Any]:
    return {"largest_labelled": 3, "folder": str(setting.folder)}


def wrong(setting: Setting) -> dict[str, Any]:
    setting.keep({"known": 1})
    raise ValueError("said\nat length")


def dies(setting: Setting) -> dict[str, Any]:
    print("about to die", flush=True)
    os.abort()


def endless(setting: Setting) -> dict[str, Any]:
    setting.keep({"known": 2})
    child = subprocess.Popen(["sleep", "100"])
    print(child.pid, flush=True)
    time.sleep(100)
    return {}


def test_what_becomes_of_parts_that_do_not_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preload([*gpu_suite.PRELOADED, __name__])
    command = ["--device", "cpu", "--tiny", "--output", "s.json", "--budget", "1000"]
    options, document = gpu_suite._parser().parse_args(command), {"parts": {}}
    parts = [
        Part("wrong", wrong, 60, joins=False),
        Part("dies", dies, 60, joins=False),
        Part("endless", endless, 4, joins=False),
        Part("lacking", good, 60, needs=("no_such_package",), joins=False),
        Part("good", good, 60, joins=False),
    ]
    gpu_suite.run_all(parts, options, document)
    found = json.loads((tmp_path / "s.json").read_text())["parts"]
    assert found["wrong"]["error"] == "ValueError: said"
    assert found["wrong"]["known"] == 1
    assert "status -6" in found["dies"]["error"]
    assert "about to die" in (tmp_path / "logs/dies.log").read_text()
    assert "stopped after 4 s" in found["endless"]["error"]
    assert found["endless"]["known"] == 2
    child = int((tmp_path / "logs/endless.log").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    assert "no_such_package" in found["lacking"]["skipped"]
    assert found["good"]["largest_labelled"] == 3
    assert Path(found["good"]["folder"]).is_absolute()  # though the output is not: it also stands in URLs
    assert document["device"]["device"] == "cpu"
    options.budget = 0.0
    gpu_suite.run_all(parts[-1:], options, document)
    assert "budget" in document["parts"]["good"]["skipped"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "s.json"]  # no scratch folder stays


def test_two_ranks_equal_one(setting: Setting) -> None:
    preload([*gpu_suite.PRELOADED, __name__])
    result = engines.two_ranks(setting)
    assert result["backend"] == "gloo"
    assert 0 < max(result["differences"].values()) < 1e-6  # fp32: other orders of sums, three steps


@pytest.mark.full
def test_without_deepspeed_and_dali_their_parts_say_so_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('deepspeed', 'nvidia.dali', 'fairscale'): sys.modules[name] = None\n"
    )
    output = tmp_path / "s.json"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--device", "cpu", "--tiny", "--output", str(output)]
    command += ["--commit", "abc", "--parts", "step_digits_cnn_8_2x2", "elementwise", "decode", "deepspeed"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=200)
    document = json.loads(output.read_text())
    assert document["commit"] == "abc"
    why = {name: result.get("skipped", "") for name, result in document["parts"].items()}
    assert "deepspeed" in why.pop("deepspeed_stages")
    assert "nvidia.dali" in why.pop("decode")
    assert why == {"step_digits_cnn_8_2x2": "", "elementwise": ""}


@pytest.mark.full
def test_importing_the_parts_leaves_cuda_alone() -> None:
    """A part is forked from a process that has imported all of them, and CUDA does not survive a fork."""
    code = (
        "import sys, torch\n"
        "called = []\n"
        "for name in [name for name in dir(torch._C) if name.startswith('_cuda_')]:\n"
        "    original = getattr(torch._C, name)\n"
        "    if callable(original) and not isinstance(original, type):\n"
        "        setattr(torch._C, name, lambda *a, n=name, f=original, **k: (called.append(n), f(*a, **k))[1])\n"
        "import importlib, benchmarks.gpu_suite\n"
        "for name in benchmarks.gpu_suite.PRELOADED: importlib.import_module(name)\n"
        "sys.exit(', '.join(called) or None)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_unknown_parts_and_full_sizes_on_a_cpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--parts no_such: .* step_digits_cnn_8_2x2, "):
        gpu_suite.main(["--device", "cpu", "--tiny", "--parts", "no_such", "--output", str(tmp_path / "s.json")])
    with pytest.raises(ValueError, match="--tiny"):
        gpu_suite.main(["--device", "cpu"])
