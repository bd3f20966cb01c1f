"""`weights: timm`: published weights from the hub's cache, laid out as huggingface_hub does it; and converted ones."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from mpl_scale.checkpoint.export import export
from mpl_scale.config import RunConfig, load_config
from mpl_scale.config.schema import NetworkConfig
from mpl_scale.models import build_model
from mpl_scale.models.hub import find_file
from mpl_scale.models.weights import load_weights
from mpl_scale.trainer.preflight import check_models, find_weights, network_notes
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHERE = "mpl_scale.model.student"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(hub: Path, name: str, *, seed: int = 1, **kwargs: Any) -> dict[str, torch.Tensor]:
    """A new timm model's weights in the cache as those of `name`, a model with its tag; kwargs: of the model."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.5, 2)
    folder = hub / f"models--timm--{name}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    state: dict[str, torch.Tensor] = model.state_dict()
    save_file(state, folder / "snapshots" / COMMIT / "model.safetensors")
    return state


def run_with(folder: Path, *overrides: str, student: dict[str, Any], size: int = 32, channels: int = 3) -> RunConfig:
    raw = tiny()
    section = raw["mpl_scale"]
    section["parallel"] = {"engine": "flat"}
    section["model"] |= {"image_size": size, "in_chans": channels, "bn_decay": 0.2, "student": student}
    section["data"] |= {"mean": [0.5] * channels, "std": [0.25] * channels}
    return load_config(write(folder, raw), overrides=overrides)


def loaded(run: RunConfig) -> dict[str, torch.Tensor]:
    """The student as a run starts with it."""
    check_models(run)
    shared = run.mpl.model
    network = build_model(shared.student, shared, field=WHERE, seed=3)
    load_weights(network, shared.student, shared, field=WHERE)
    return network.state_dict()


@pytest.mark.parametrize("name", ["resnet10t.c3_in1k", "resnet10t"])
def test_the_models_own_weights_come_from_the_cache(tmp_path: Path, hub: Path, name: str) -> None:
    """By the tag, or by timm's default tag. The whole network gives what timm's gives, batch norm's eps included."""
    publish(hub, "resnet10t.c3_in1k")
    classes = "mpl_scale.model.num_classes=1000"
    run = run_with(tmp_path, classes, student={"name": name, "weights": "timm"})
    shared = run.mpl.model
    ours = build_model(shared.student, shared, field=WHERE, seed=3)
    load_weights(ours, shared.student, shared, field=WHERE)
    theirs = timm.create_model("resnet10t.c3_in1k", pretrained=True, cache_dir=hub)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)  # fp32
    (note,) = network_notes(run)
    path = hub / "models--timm--resnet10t.c3_in1k" / "snapshots" / COMMIT / "model.safetensors"
    count = len(theirs.state_dict())
    assert note == f"{WHERE}.weights = timm ({path}): {count} of {count} tensors loaded"


@pytest.mark.parametrize("channels", [1, 5])
def test_other_images_and_classes_are_converted_as_timm_does(tmp_path: Path, hub: Path, channels: int) -> None:
    """160 pixels, 3 channels, 1000 classes -> 32 pixels, other channels, 10 classes; other tensors bit for bit."""
    state = publish(hub, "test_vit.r160_in1k")
    student = {"name": "test_vit", "weights": "timm", "kwargs": {"img_size": 32}}
    run = run_with(tmp_path, student=student, channels=channels)
    found = loaded(run)
    expected = {key: value for key, value in state.items() if not key.startswith("head.")}
    expected["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=[2, 2], num_prefix_tokens=1)
    expected["patch_embed.proj.weight"] = adapt_input_conv(channels, state["patch_embed.proj.weight"])
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    (note,) = network_notes(run)
    assert f": {len(expected)} of {len(found)} tensors loaded; first convolution" in note
    for part in (
        f"first convolution patch_embed.proj.weight adapted from 3 to {channels} channels",
        "position embedding pos_embed resampled from 1x101x64 to 1x5x64",
        "its classifier (head.weight, head.bias; of 1000 classes in the file) starts untrained",
    ):
        assert part in note


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet10t", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 1}),
    ],
)
def test_families_are_converted_as_timm_does(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    """From a file, equal to timm's own loading of it; relative positions and several classifiers among them."""
    torch.manual_seed(1)
    built = {key: value for key, value in kwargs.items() if key not in ("img_size", "window_size")}
    save_file(timm.create_model(name, **built).state_dict(), tmp_path / "model.safetensors")
    given = {"file": str(tmp_path / "model.safetensors"), "num_classes": 1000}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=given, num_classes=10, in_chans=1, **kwargs
    ).state_dict()
    run = run_with(
        tmp_path,
        student={"name": name, "weights": str(tmp_path), "kwargs": kwargs},
        size=kwargs.get("img_size", 32),
        channels=1,
    )
    found = loaded(run)
    heads = timm.get_pretrained_cfg(name).classifier
    for key, value in theirs.items():
        if not key.startswith(heads) and "running_var" not in key:  # moved by the difference of eps
            assert torch.equal(found[key], value), key


def test_weights_without_a_classifier_leave_it_new(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    run = run_with(tmp_path, student={"name": "test_vit", "weights": str(tmp_path), "kwargs": {"img_size": 32}})
    found = loaded(run)
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert "its classifier (head.weight, head.bias; of 0 classes in the file) starts untrained" in network_notes(run)[0]


def test_offline_without_the_file_is_one_line_with_its_place_and_the_fix(tmp_path: Path, hub: Path) -> None:
    """And before the data are read, whose source does not exist here."""
    run = run_with(
        tmp_path,
        "mpl_scale.data.source=folder",
        "mpl_scale.data.root=/nowhere",
        student={"name": "resnet10t", "weights": "timm"},
    )
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        train(run, Options(tmp_path / "out"))
    said = str(caught.value)
    place = hub / "models--timm--resnet10t.c3_in1k" / "snapshots" / "COMMIT" / "model.safetensors"
    assert said.startswith(f"{WHERE}.weights = timm: {place} is not there, and timm/resnet10t.c3_in1k cannot be")
    assert "run `hf download timm/resnet10t.c3_in1k model.safetensors` on a machine with a network" in said
    assert "set weights to a file" in said


def test_one_of_several_processes_downloads(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server that answers as the hub does; four at once, and the file is sent once."""
    content, sent = random.randbytes(1 << 16), []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/timm/resnet10t.c3_in1k/resolve/main/model.safetensors" else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self) -> None:
            sent.append(self.path)
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    network = NetworkConfig(name="resnet10t", weights="timm")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server, ThreadPoolExecutor() as threads:
        threads.submit(server.serve_forever)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        try:
            found = [threads.submit(find_file, network, field="student") for _ in range(4)]
            paths = {path.result(timeout=60) for path in found}
        finally:
            server.shutdown()
    assert paths == {hub / "models--timm--resnet10t.c3_in1k" / "snapshots" / COMMIT / "model.safetensors"}
    assert paths.pop().read_bytes() == content
    assert len(sent) == 1
    assert find_file(network, field="student").read_bytes() == content  # the server is gone


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("digits_cnn", r"timm has no weights of digits_cnn on the hub; set weights to a model\.safetensors"),
        ("coatnet_0_224", r"no weights of coatnet_0_224 on the hub; set weights to"),
        (
            "resnet10t.c4",
            r"no weights of resnet10t\.c4 on the hub; set name to one of resnet10t\.c3_in1k, or weights to",
        ),
        ("gcvit_base.in1k", r"no weights of gcvit_base\.in1k on the hub; set weights to"),  # at a URL alone
        ("resnet10x", r"student\.name = 'resnet10x'"),
    ],
)
def test_models_without_published_weights_are_refused_by_name(tmp_path: Path, hub: Path, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_weights(run_with(tmp_path, student={"name": name, "weights": "timm"}))
    assert not hub.exists()


def test_what_still_differs_is_refused(tmp_path: Path, hub: Path) -> None:
    publish(hub, "test_vit.r160_in1k")
    other = {"name": "test_vit", "weights": "timm", "kwargs": {"img_size": 32, "embed_dim": 32}}
    with pytest.raises(
        ValueError, match=r"student\.weights = timm is of another model .*blocks\.0\.attn\.proj\.bias is"
    ):
        check_models(run_with(tmp_path, student=other))
    deeper = {"name": "test_vit", "weights": "timm", "kwargs": {"img_size": 32, "depth": 9}}
    with pytest.raises(ValueError, match=r"missing \['blocks\.[6-9].* and \d+ more"):
        check_models(run_with(tmp_path, student=deeper))


def test_a_run_knows_the_file_behind_the_name(tmp_path: Path, hub: Path) -> None:
    """It goes on with the weights that it started from, in the cache or in a file elsewhere. And it is exported."""
    student = {"name": "test_vit.r160_in1k", "kwargs": {"img_size": 32}, "weights": "timm"}
    state = publish(hub, "test_vit.r160_in1k")
    run, output = run_with(tmp_path, "mpl_scale.phases.finetune.steps=0", student=student), tmp_path / "out"
    assert train(run, Options(output, max_steps=1)) is not None
    save_file(state, tmp_path / "model.safetensors")
    as_file = load_config(run.path, overrides=["mpl_scale.phases.finetune.steps=0", f"{WHERE}.weights={tmp_path}"])
    assert train(as_file, Options(output, max_steps=1)) is not None
    publish(hub, "test_vit.r160_in1k", seed=2)
    with pytest.raises(ValueError, match=r'weights\.student: "\w+" -> "\w+" \(fixed for a run\)'):
        train(run, Options(output, max_steps=1))
    export(max((output / "checkpoints").glob("step_*")), tmp_path / "exported", network="student")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["architecture"] == "test_vit"
    model = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_the_environment_says_where_the_cache_is(tmp_path: Path) -> None:
    publish(tmp_path / "home" / "hub", "test_vit.r160_in1k")
    code = (
        "from mpl_scale.config.schema import NetworkConfig\nfrom mpl_scale.models.hub import find_file\n"
        "print(find_file(NetworkConfig(name='test_vit', weights='timm'), field='student'))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert found.stdout.startswith(str(tmp_path / "home" / "hub" / "models--timm--test_vit.r160_in1k")), found.stderr
