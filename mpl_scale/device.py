"""How a device computes: cuDNN's choice of algorithms, TF32, determinism, and whether it has bf16 units.

The one place that sets torch's flags for this. A run, a benchmark and the tests call `Numerics.apply`, so that what is
measured is what is trained.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Numerics:
    """Flags of the process.

    tf32: a GPU's fp32 products and convolutions round their factors to TF32.
    deterministic: the same bits in every run; else cuDNN times its algorithms at the first step (shapes do not change)
        and keeps the fastest.
    """

    tf32: bool = True
    deterministic: bool = False

    def apply(self, device: torch.device) -> None:
        """Set them, before the first kernel: cuBLAS reads its workspace's setting when it starts."""
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:
            torch.use_deterministic_algorithms(self.deterministic)
        if device.type != "cuda":
            return
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = not self.deterministic
        torch.backends.cudnn.deterministic = self.deterministic
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32  # float32_matmul_precision too: high or highest


def emulates_bf16(device_type: str) -> bool:
    """Whether bf16 is emulated on this machine's device of a type. False where that is not known."""
    if device_type == "cuda":
        return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and CPUINFO.exists() and lacks_bf16(CPUINFO.read_text())


def lacks_bf16(cpuinfo: str) -> bool:
    """Whether a processor lacks instructions for bf16 products; cpuinfo: text of /proc/cpuinfo.

    x86: avx512_bf16 or amx_bf16 among its flags. Arm: bf16 among its Features. Others are not known: False.
    """
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    found = next((names.split() for key, _, names in lines if key.strip() in ("flags", "Features")), None)
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"} & set(found)
