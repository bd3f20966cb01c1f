"""README.md of an exported network: a model card as the Hugging Face hub shows it, without paths of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpl_scale.config.schema import Config, NetworkConfig
from mpl_scale.data.vectors import input_shape
from mpl_scale.models.registry import MODELS

CARD_NAME = "README.md"
_SHOWN = 20
_ARXIV = "https://arxiv.org/abs"
_MPL = ("Meta Pseudo Labels", f"{_ARXIV}/2003.10580")
PAPERS = {
    "mpl": _MPL,
    "reduced_mpl": _MPL,
    "uda": ("UDA", f"{_ARXIV}/1904.12848"),
    "fixmatch": ("FixMatch", f"{_ARXIV}/2001.07685"),
    "flexmatch": ("FlexMatch", f"{_ARXIV}/2110.08263"),
    "freematch": ("FreeMatch", f"{_ARXIV}/2205.07246"),
    "softmatch": ("SoftMatch", f"{_ARXIV}/2301.10921"),
    "noisy_student": ("Noisy Student", f"{_ARXIV}/1911.04252"),
    "mixup": ("mixup", f"{_ARXIV}/1710.09412"),
    "cutmix": ("CutMix", f"{_ARXIV}/1905.04899"),
}
"""By `mpl_scale.method.name`; others are named without a link."""

_PROGRAMS = {
    "torch_export": """import torch

model = torch.export.load("model.pt2").module()
logits = model(images)""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"images": images})""",
}


@dataclass(frozen=True)
class Exported:
    """What a card is about.

    network: "teacher", "student" or "ema"; section: its own. step: of all phases. metadata: the checkpoint's.
    content: of config.json. format: the network's file's, of export.FILES.
    """

    config: Config
    section: NetworkConfig
    network: str
    step: int
    metadata: Mapping[str, Any]
    content: Mapping[str, Any]
    format: str = "timm"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what the network takes, without the batch: (C, H, W), or (F,) of vectors."""
        return input_shape(self.config)

    @property
    def of_timm(self) -> bool:
        """Whether timm builds the model; others are registered here or in the run's own modules."""
        return self.section.name not in MODELS

    def metrics(self) -> Mapping[str, float] | None:
        """The run's own evaluation of these weights: top1, top5 in percent, loss, images; None: there was none."""
        phase, steps = self.metadata.get("phase"), self.metadata.get("identity", {}).get("steps", {})
        if self.metadata.get("phase_step") != steps.get(phase):  # later weights than those evaluated
            return None
        name = "finetuned" if phase == "finetune" and self.network == "student" else self.network
        return self.metadata.get("results", {}).get(name)


def model_card(exported: Exported) -> str:
    """The text: front matter, what was trained on what, accuracy, and how the folder is loaded."""
    library = "timm" if exported.of_timm else "mpl_scale"
    library = {"torch_export": "pytorch", "onnx": "onnx"}.get(exported.format, library)
    method = exported.config.method.name
    task = "image-classification" if len(exported.shape) == 3 else "tabular-classification"
    tags = [task, library, *(["meta-pseudo-labels"] if method in ("mpl", "reduced_mpl") else [])]
    front = [f"library_name: {library}", f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in tags)]
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(exported).items())
    return "\n".join(
        [
            "---",
            *front,
            "metrics:",
            "- accuracy",
            "# license: add the one of your choice",
            "---",
            "",
            f"# {exported.section.name}, {exported.config.model.num_classes} classes",
            "",
            "A classifier, trained by mpl_scale.",
            "",
            f"| | |\n|---|---|\n{rows}",
            "",
            "## Load it",
            "",
            _loading(exported),
            "",
        ]
    )


def _facts(exported: Exported) -> dict[str, str]:
    config, names = exported.config, exported.content.get("label_names")
    paper, address = PAPERS.get(config.method.name, (config.method.name, None))
    facts = {
        "classes, in order of the logits": _classes(names) if names else f"{config.model.num_classes}, without names",
        "data": _cell(_data(exported)),
        "method": f"[{paper}]({address})" if address else _cell(paper),
        "network": f"{exported.network}, after {exported.step:,} steps",
        "input": _input(exported),
    }
    if metrics := exported.metrics():
        part = "validation" if config.data.evaluate_on == "held_out" else "test"
        facts[f"accuracy, {metrics['images']:,.0f} {part} images"] = (
            f"top-1 {metrics['top1']:.2f}%, top-5 {metrics['top5']:.2f}%, loss {metrics['loss']:.4f}"
        )
    return facts


def _classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more: `label_names` of config.json" if len(names) > _SHOWN else ""
    return ", ".join(_cell(str(name)) for name in names[:_SHOWN]) + more


def _input(exported: Exported) -> str:
    data, shape, view = exported.config.data, exported.shape, exported.content["pretrained_cfg"]
    if len(shape) == 1:
        return f"vectors of {shape[0]} numbers"
    colours = {1: "grey", 3: "RGB"}.get(shape[0], f"{shape[0]}-channel")
    return (
        f"{colours} images of {shape[1]} x {shape[2]} ({view['interpolation']}, crop_pct {view['crop_pct']:g}); values "
        f"of 0 to 1, less mean {list(data.mean)}, over std {list(data.std)}"
    )


def _data(exported: Exported) -> str:
    parts = exported.metadata.get("identity", {}).get("manifest", {}).get("parts", {})
    counts = [f"{parts[name]['count']:,} {name}" for name in ("labelled", "unlabelled") if name in parts]
    data = exported.config.data
    source = "labelled and unlabelled images apart" if data.labelled is not None else f"`{data.source}`"
    return f"{source}: {', '.join(counts)} images for training" if counts else source


def _cell(text: str) -> str:
    """The text in a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def _loading(exported: Exported) -> str:
    takes = f"float32 [N, {', '.join(map(str, exported.shape))}], as the table says"
    if len(exported.shape) == 3:
        takes = f"normalised images, {takes}"
    if exported.format != "timm":
        return f"""In this folder:

```python
{_PROGRAMS[exported.format]}
```

The input, `images`, is {takes}, for any N; it gives `logits`, float32 [N, {exported.config.model.num_classes}]."""
    if exported.of_timm:
        channels, transform = exported.config.model.in_chans, ""
        called, of = "images", f" It takes {takes}."
        if channels in (1, 3):
            transform = "\ntransform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
            mode = "L" if channels == 1 else "RGB"
            called, of = "transform(image).unsqueeze(0)", f" `image` is a PIL image of mode {mode}."
        names = (
            'their names are `model.pretrained_cfg["label_names"]`' if "label_names" in exported.content else "numbered"
        )
        return f"""In this folder:

```python
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval(){transform}
```

`model({called}).softmax(1)` has the probabilities of the classes, {names}.{of}
From the hub: `hf-hub:USER/NAME` instead of `local-dir:.`."""
    imports = "".join(f"import {module}\n" for module in exported.config.imports)
    arguments = {"num_classes": exported.config.model.num_classes, **exported.content.get("model_args", {})}
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"""In this folder, with mpl_scale, where the model is registered:

```python
from mpl_scale.models.registry import find_builder
from safetensors.torch import load_file
{imports}
model = find_builder("{exported.section.name}", field="name")({given}).eval()
model.load_state_dict(load_file("model.safetensors"))
```

It takes {takes}."""
