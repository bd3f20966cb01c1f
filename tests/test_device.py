"""Which GPU a rank takes, how the device is set up, and what is said of a processor without bf16."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mpl_scale.device
from mpl_scale.cli.check import report
from mpl_scale.config import load_config
from mpl_scale.device import Numerics, lacks_bf16
from mpl_scale.mesh import adopt_slurm_environment, choose_device, refuse_shared_gpu
from tests.support.configs import tiny, write

CUDA = torch.device("cuda")
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NNODES": "1"}


def visible(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """torch sees so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "environment", "index"),
    [
        (8, {"LOCAL_RANK": "3"}, 3),
        (1, {}, 0),
        (1, {**SRUN, "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "1"}, 0),
        (1, {**SRUN, "SLURM_GPUS_PER_TASK": "1"}, 0),  # a site whose prolog unsets it
        (1, {**SRUN, "SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}, 0),
        (1, {**SRUN, "CUDA_VISIBLE_DEVICES": "0"}, 0),  # --gpu-bind=single:1 with cgroups: each task's own is 0
        (1, {"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, 0),  # a wrapper
        (2, {**SRUN, "SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "2,3"}, 1),
    ],
)
def test_the_gpu_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, count: int, environment: dict[str, str], index: int
) -> None:
    visible(monkeypatch, count)
    environment = dict(environment)
    adopt_slurm_environment(environment)
    assert choose_device(environment) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("count", "environment"),
    [
        (1, {"LOCAL_RANK": "1"}),  # torchrun --nproc_per_node 2 where there is one GPU
        (1, {"LOCAL_RANK": "1", "SLURM_LOCALID": "0", "SLURM_GPUS_PER_TASK": "1"}),  # torchrun inside one task
        (1, {**SRUN, "SLURM_TRES_PER_TASK": "cpu=4"}),
        (2, {"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}),
        (2, {"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "0"}),  # set too late: torch has counted
    ],
)
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, count: int, environment: dict[str, str]
) -> None:
    visible(monkeypatch, count)
    environment = dict(environment)
    adopt_slurm_environment(environment)
    with pytest.raises(ValueError, match=rf"sees {count} GPUs?; start at most {count} .*--gpus-per-task=1"):
        choose_device(environment)


def test_two_ranks_of_one_gpu_are_named() -> None:
    """As torchrun with CUDA_VISIBLE_DEVICES=0 starts them; the same index on two hosts is two GPUs."""
    refuse_shared_gpu([("n0", "a"), ("n0", "b"), ("n1", "a")])
    with pytest.raises(ValueError, match="ranks 1 and 3 both compute on GPU b of n0"):
        refuse_shared_gpu([("n0", "a"), ("n0", "b"), ("n1", "b"), ("n0", "b")])


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's flags as they were, afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn, matmul, tf32 = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before
    matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_gpus_flags(tf32: bool, deterministic: bool) -> None:
    """Each apply sets all of them, whatever was set before; none of it needs a GPU."""
    Numerics(tf32=not tf32, deterministic=not deterministic).apply(CUDA)
    Numerics(tf32=tf32, deterministic=deterministic).apply(CUDA)
    cudnn = torch.backends.cudnn
    assert (cudnn.benchmark, cudnn.deterministic) == (not deterministic, deterministic)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert (cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (tf32, tf32)
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if tf32 else "ieee")  # what inductor asks
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # one of the two was deterministic


@pytest.mark.usefixtures("flags")
def test_on_a_cpu_only_determinism_is_set() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    Numerics(tf32=True, deterministic=True).apply(torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.gpu
@pytest.mark.usefixtures("flags")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; test_a_gpus_flags is its CPU twin")
def test_tf32_rounds_and_fp32_does_not() -> None:
    """A product of 1 + 2^-12 with 1: TF32 has 10 bits of mantissa, so that it is 1 there."""
    a, b = torch.full((64, 64), 1 + 2**-12, device=CUDA), torch.eye(64, device=CUDA)
    Numerics(tf32=False).apply(CUDA)
    assert torch.equal(a @ b, a)
    Numerics(tf32=True).apply(CUDA)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not torch.equal(a @ b, a)


EPYC_7763 = "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 fma vaes\nprocessor\t: 1\nflags\t\t: fpu avx2\n"


@pytest.mark.parametrize(
    ("cpuinfo", "lacks"),
    [
        (EPYC_7763, True),
        ("flags\t\t: avx512f avx512_vnni\n", True),
        ("flags\t\t: avx512f avx512_bf16\n", False),
        ("flags\t\t: avx_vnni amx_bf16 amx_tile\n", False),
        ("Features\t: fp asimd asimdhp i8mm bf16\n", False),
        ("Features\t: fp asimd\n", True),
        ("isa\t\t: rv64imafdc\n", False),  # not known
        ("", False),
    ],
)
def test_bf16_instructions(cpuinfo: str, lacks: bool) -> None:
    assert lacks_bf16(cpuinfo) is lacks


@pytest.mark.parametrize(
    ("bf16", "text", "warned"), [(True, EPYC_7763, True), (True, "", False), (False, EPYC_7763, False)]
)
def test_check_warns_of_emulated_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, text: str, warned: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    monkeypatch.setattr(mpl_scale.device, "CPUINFO", cpuinfo)
    run = load_config(write(tmp_path, tiny(bf16={"enabled": bf16})))
    said = report(run, world=1, cuda=False)
    assert any(line.startswith("warning: bf16.enabled = true, but this processor") for line in said) is warned
    assert (
        any("V100 SXM2 16 GB has no bf16 units" in line for line in report(run, world=1, cuda=True, gpu="v100-16"))
        is bf16
    )
    monkeypatch.setattr(mpl_scale.device, "CPUINFO", tmp_path / "none")  # macOS
    assert not any("emulated" in line for line in report(run, world=1, cuda=False))
