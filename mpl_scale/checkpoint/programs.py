"""A network as one file that runs without its code: a program of torch.export (.pt2), or ONNX.

Both take what timm's models take, normalised images, float32 [N, C, H, W] with any N, and give logits, float32 [N, K].
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mpl_scale.packages import require_packages

FILES = {"torch_export": "model.pt2", "onnx": "model.onnx"}
"""By format."""
ONNX_DATA = "model.onnx.data"
"""Beside model.onnx where the weights do not fit into one file, whose limit is 2 GB."""
INPUT, OUTPUT = "images", "logits"
"""Names of an ONNX file's ends."""
TOLERANCE = 1e-3
"""Of the largest logit. Sums in another order and batch norms folded into convolutions change fp32 logits by 1e-6 to
1e-4 of it; what is computed otherwise, as a batch norm with another eps, by more."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCHES = (1, 3)

Logits = Callable[[torch.Tensor], torch.Tensor]


def require_format(name: str) -> None:
    """ValueError where the packages of a format are missing."""
    if name == "onnx":
        require_packages([("--format onnx", module) for module in _PACKAGES])


@torch.no_grad()
def write_program(model: nn.Module, folder: Path, *, format: str, shape: tuple[int, ...], own: Logits) -> None:
    """Write a model into `folder`, load it from there, and compare it with the network it was made of.

    Args:
        model: in evaluation mode, on the CPU.
        format: of FILES.
        shape: of one input.
        own: the network's own logits.

    Raises:
        ValueError: the model cannot be exported (a shape that depends on values, an operator that ONNX has not), or its
            program gives other logits. What is in `folder` is of no use then.
        OSError: it cannot be written.
    """
    path = folder / FILES[format]
    try:
        program = _captured(model, shape)
        made = _to_onnx(program) if format == "onnx" else None
    except Exception as error:  # what tracing meets, in the model's own code
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ValueError(
            f"--format {format}: the model cannot be exported ({type(error).__name__}: {reason}); use --format timm"
        ) from error
    if made is None:  # torch's writer of files ends the process where the disk is full
        packed = io.BytesIO()
        torch.export.save(program, packed)
        path.write_bytes(packed.getbuffer())
    else:
        made.save(path)
    _compare(_loaded(path), own, format=format, shape=shape)


def _captured(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """Of any batch size, and without the source lines of this machine."""
    example = (torch.zeros(2, *shape),)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _to_onnx(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT])
    assert made is not None
    return made


def _loaded(path: Path) -> Logits:
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda images: module(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _compare(program: Logits, own: Logits, *, format: str, shape: tuple[int, ...]) -> None:
    """ValueError where the two give different logits of random images."""
    for batch in _BATCHES:
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        expected, found = own(images), program(images)
        largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # of a network that starts with zeros
        difference = float((found - expected).abs().max() / largest)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"--format {format}: the program's logits differ from the network's by {difference:.1e} of the largest "
                f"one, more than {TOLERANCE:.0e}; nothing was written, use --format timm"
            )
