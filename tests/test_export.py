"""A network leaves a checkpoint as timm has it, gives the same logits there, and comes back; inspect tells damage."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from mpl_scale.checkpoint import find
from mpl_scale.checkpoint.export import checkpoint_config, export, read_network
from mpl_scale.cli.main import main
from mpl_scale.config import load_config
from mpl_scale.models import build_model
from mpl_scale.models.registry import MODELS as MODELS_BY_NAME
from mpl_scale.models.weights import load_weights, plain_model
from mpl_scale.trainer.prepare import Options, train
from tests.support.configs import tiny, write
from tests.support.exported import MODELS, assert_same_logits, built, checkpoint_of
from tests.support.runs import StopAfter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More make tiny tensors slower, where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("network", MODELS, ids=lambda network: str(network["name"]))
def test_timm_gives_the_logits_of_the_run(tmp_path: Path, network: dict[str, Any], long: bool) -> None:
    checkpoint, config = checkpoint_of(tmp_path, long=long, **network)
    (tmp_path / "splits").mkdir()
    names = [f"the digit {number}" for number in range(10)]
    (tmp_path / "splits" / "classes.json").write_text(json.dumps(names))
    out = tmp_path / "out"
    assert main(["export", str(tmp_path), "--output", str(out)]) == 0
    content = json.loads((out / "config.json").read_text())
    assert content["architecture"] == network["name"]
    assert content["batch_norm"] == {"eps": 1e-3, "momentum": pytest.approx(1.0 - config.model.bn_decay)}
    ours = built(config, checkpoint)
    file = str(out / "model.safetensors")
    like = {"num_classes": content["num_classes"], **network.get("kwargs", {})}
    assert_same_logits(ours, timm.create_model(content["architecture"], checkpoint_path=file, **like))
    hub = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert_same_logits(ours, hub)
    assert list(hub.pretrained_cfg["label_names"]) == names
    seen = timm.data.resolve_model_data_config(hub)
    assert tuple(seen["input_size"]) == (3, 32, 32)
    assert (tuple(seen["mean"]), tuple(seen["std"])) == (config.data.mean, config.data.std)
    assert (seen["interpolation"], seen["crop_pct"]) == ("bilinear", 1.0)


@pytest.mark.parametrize("network", [*MODELS[:1], {"name": "wide_resnet28_2"}], ids=lambda n: str(n["name"]))
def test_exported_weights_come_back(tmp_path: Path, network: dict[str, Any]) -> None:
    checkpoint, config = checkpoint_of(tmp_path, **network)
    export(checkpoint, tmp_path / "out", network="student")
    section = config.model.student.model_copy(update={"weights": str(tmp_path / "out")})
    back = build_model(section, config.model, field="student", seed=1)
    load_weights(back, section, config.model, field="student")
    assert_same_logits(built(config, checkpoint), back)
    plain = plain_model(section, config.model, field="student", device="cpu")
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))  # strict: the model's own keys
    assert_same_logits(built(config, checkpoint), plain)


@torch.no_grad()
@pytest.mark.parametrize("network", [*MODELS[:1], {"name": "digits_cnn"}], ids=lambda n: str(n["name"]))
def test_the_card_tells_what_it_is_and_its_lines_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: dict[str, Any]
) -> None:
    results = {"student": {"top1": 12.5, "top5": 50.0, "loss": 2.0, "images": 599.0}}
    counts = {"labelled": {"count": 40}, "unlabelled": {"count": 1198}}
    known = {"results": results, "identity": {"steps": {"train": 3}, "manifest": {"parts": counts}}}
    checkpoint, config = checkpoint_of(tmp_path, about=known, **network)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "classes.json").write_text(json.dumps([f"a|b {number}" for number in range(10)]))
    export(checkpoint, tmp_path / "out", network="student")
    monkeypatch.chdir(tmp_path / "out")
    text = Path("README.md").read_text()
    front = ModelCard(text).data.to_dict()
    of_timm = network["name"] == "resnet10t"
    assert front["library_name"] == ("timm" if of_timm else "mpl_scale")
    assert "license" not in front
    assert "meta-pseudo-labels" in front["tags"]
    for part in ("40 labelled, 1,198 unlabelled", "2003.10580", "top-1 12.50%", "599 test images", r"a\|b 0, a\|b 1"):
        assert part in text
    assert f"mean {list(config.data.mean)}, over std {list(config.data.std)}" in text
    assert str(tmp_path) not in text
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    loaded: dict[str, Any] = {}
    exec(lines, loaded)
    assert_same_logits(built(config, checkpoint), loaded["model"])
    if of_timm:
        image = loaded["transform"](Image.new("RGB", (50, 40), (255, 0, 0)))
        torch.testing.assert_close(
            image[:, 5, 5], (torch.tensor([1.0, 0, 0]) - torch.tensor(config.data.mean)) / torch.tensor(config.data.std)
        )


def test_a_card_has_no_accuracy_of_other_weights(tmp_path: Path) -> None:
    """The results are of the end of a phase of 4 steps, the checkpoint of step 3."""
    known = {"results": {"student": {"top1": 12.5}}, "identity": {"steps": {"train": 4}}}
    export(checkpoint_of(tmp_path, about=known, name="digits_cnn")[0], tmp_path / "out", network="student")
    assert "top-1" not in (tmp_path / "out" / "README.md").read_text()


def test_another_network_is_replaced_only_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = checkpoint_of(tmp_path, **MODELS[0])
    out = tmp_path / "out"
    export(checkpoint, out, network="student")
    export(checkpoint, out, network="student")  # the same once more
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "other").mkdir()
    checkpoint_of(tmp_path / "other", long=True, **MODELS[0])
    command = ["export", str(tmp_path / "other"), "--output", str(out)]
    assert main(command) == 2
    assert f"--output {out} holds another network (model.safetensors); give --overwrite" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command, "--overwrite"]) == 0
    (out / "model.safetensors").write_bytes(b"cut short")
    assert main(command) == 2


def test_a_network_that_the_checkpoint_lacks_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint_of(tmp_path, name="digits_cnn")
    assert main(["export", str(tmp_path), "--network", "ema", "--output", str(tmp_path / "out")]) == 2
    assert re.search(r"--network ema: checkpoint .* holds student only; choose another", capfd.readouterr().err)


def test_a_run_starts_from_exported_weights(tmp_path: Path) -> None:
    raw = tiny()
    raw["mpl_scale"]["parallel"] = {"engine": "flat"}
    raw["mpl_scale"]["method"]["ema_decay"] = 0.9
    raw["mpl_scale"]["phases"]["finetune"] = {"steps": 0}
    config = write(tmp_path, raw)
    assert train(load_config(config), Options(tmp_path / "first")) is not None
    checkpoint = find(tmp_path / "first" / "checkpoints")[0]
    first = {}
    for name in ("teacher", "student", "ema"):
        export(checkpoint, tmp_path / name, network=name)
        first[name] = read_network(checkpoint, name)
    assert not torch.equal(first["ema"]["classifier.weight"], first["student"]["classifier.weight"])
    started = [f"mpl_scale.model.{name}.weights={tmp_path / name}" for name in ("teacher", "student")]
    still = ["mpl_scale.optim.student.lr=0", "mpl_scale.optim.teacher.lr=0", "mpl_scale.phases.teacher_warmup.steps=0"]
    run = load_config(config, overrides=[*started, *still])
    assert train(run, Options(tmp_path / "second"), stop_requested=StopAfter(1)) is None
    second = find(tmp_path / "second" / "checkpoints")[0]
    for name in ("teacher", "student"):
        found = read_network(second, name)
        trained = [key for key in found if "running" not in key and "tracked" not in key]
        assert trained
        for key in trained:  # at a rate of 0 one step leaves them bit for bit
            assert torch.equal(found[key], first[name][key]), key
    assert checkpoint_config(second).model.student.weights == str(tmp_path / "student")


def test_export_imports_the_modules_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not seen the model yet, as `mpl-scale export` is."""
    code = (
        "from mpl_scale.models.registry import MODELS, register_model\nfrom mpl_scale.models.small import DigitsCNN\n"
    )
    (tmp_path / "export_my_parts.py").write_text(code + "register_model('export_my_cnn')(DigitsCNN)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    checkpoint, _ = checkpoint_of(tmp_path, imports=("export_my_parts",), name="export_my_cnn")
    del MODELS_BY_NAME["export_my_cnn"]
    monkeypatch.delitem(sys.modules, "export_my_parts")
    export(checkpoint, tmp_path / "out", network="student")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "export_my_cnn"


def test_weights_of_another_model_are_one_error_before_training(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, tiny()))
    raw = tiny()
    good = plain_model(config.mpl.model.student, config.mpl.model, field="student", device="cpu").state_dict()
    file = tmp_path / "model.safetensors"
    raw["mpl_scale"]["model"]["student"]["weights"] = str(file)
    path = write(tmp_path, raw, "weights.json")

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            train(load_config(path), Options(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    refused(r"mpl_scale\.model\.student\.weights = .*cannot be read as safetensors")
    file.write_bytes(b"\x80\x04pickled")
    refused("cannot be read as safetensors")
    save_file({**good, "more": torch.ones(1)}, file)
    refused(r"is of another model than .*digits_cnn: unexpected \['more'\]")
    save_file({k: v for k, v in good.items() if k != "classifier.bias"}, file)
    refused(r"missing \['classifier.bias'\]")
    save_file({**good, "classifier.bias": torch.ones(1000)}, file)
    refused(r"classifier.bias is \[1000\], the model has \[10\]")


def test_inspect_shows_a_checkpoint_and_tells_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = checkpoint_of(tmp_path, name="digits_cnn")
    assert main(["inspect", str(tmp_path), "--verify", "--tensors"]) == 0
    said = capsys.readouterr().out
    for part in ("train, step 3", "1 rank\n", "student/master", "float32", "classifier.weight  [10,", "method mpl"):
        assert part in said
    assert "every file has the checksum" in said
    shard = checkpoint / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(checkpoint)]) == 0  # sizes alone
    assert main(["inspect", str(checkpoint), "--verify"]) == 1
    assert "damaged: rank_00000.safetensors has CRC-32" in capsys.readouterr().out
    os.truncate(shard, 100)
    assert main(["inspect", str(checkpoint)]) == 1
    assert "damaged: rank_00000.safetensors has 100 bytes" in capsys.readouterr().out
    shard.unlink()
    assert main(["inspect", str(checkpoint)]) == 1
    assert "cannot be read (No such file" in capsys.readouterr().out
    (checkpoint / "index.json").unlink()
    assert main(["inspect", str(checkpoint)]) == 1
    assert "index.json is missing" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    assert main(["export", str(tmp_path), "--network", "teacher", "--output", str(tmp_path / "out")]) == 2
