"""A checkpoint is the same state whoever reads it, survives kills, and says what is wrong when it cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from mpl_scale.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    Entry,
    find,
    load,
    network_entries,
    newest_good,
    read_prefix,
    replicated_entries,
    save,
    shard_entries,
)
from mpl_scale.mesh import build_mesh
from tests.support.checkpoints import CPU, build, check_load, expected, load_newest_here, save_step
from tests.support.ranks import pool


@pytest.mark.parametrize(("writers", "shard_size"), [(4, None), (4, 2), (2, 1), (1, None)])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, writers: int, shard_size: int | None) -> None:
    path = pool(writers).run(save_step, str(tmp_path), 7, shard_size=shard_size)[0]
    pool(4).run(check_load, path, 7)
    pool(4).run(check_load, path, 7, shard_size=2)
    pool(2).run(check_load, path, 7)
    check_load(path, 7)


def test_format_is_plain_json_and_tensors(tmp_path: Path) -> None:
    folder = Path(pool(4).run(save_step, str(tmp_path), 7)[0])
    assert folder.name == "step_00000007"
    assert (tmp_path / "latest").read_text() == "step_00000007\n"
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", *(f"rank_{r:05d}.safetensors" for r in range(4))]
    index = json.loads((folder / "index.json").read_text())
    entry = index["entries"]["student/master/0.weight"]
    assert (entry["shape"], entry["dtype"]) == ([5, 7], "float32")
    assert sum(piece["length"] for piece in entry["pieces"]) == 35
    for file in folder.glob("rank_*"):
        header_size = int.from_bytes(file.read_bytes()[:8], "little")
        json.loads(file.read_bytes()[8 : 8 + header_size])  # a safetensors header, then raw numbers: no pickle
    weights = read_prefix(folder, "student/master")
    assert torch.equal(weights["0.weight"], expected("master/0.weight", (5, 7), 7))
    with pytest.raises(CheckpointError, match=r"nothing under 'ema'.*student/master"):
        read_prefix(folder, "ema")


def test_replicated_and_averaged_state_round_trips(tmp_path: Path) -> None:
    mesh, network, _ = build()
    counters = {"step": torch.tensor(12), "h": torch.tensor(0.1, dtype=torch.float64), "none": torch.zeros(0, 3)}
    average = [torch.randn_like(shard) for shard in network.master]

    def entries(tensors: dict[str, torch.Tensor], shards: list[torch.Tensor]) -> list[Entry]:
        return replicated_entries("state", tensors, mesh=mesh) + shard_entries(
            "ema", network.layout, tensors=shards, write=True
        )

    path = save(tmp_path, step=1, entries=entries(counters, average), metadata={}, mesh=mesh, keep=1)
    loaded = {name: torch.empty_like(tensor) for name, tensor in counters.items()}
    shards = [torch.empty_like(shard) for shard in average]
    load(path, entries(loaded, shards), mesh=mesh)
    assert all(torch.equal(loaded[name], counters[name]) for name in counters)
    assert all(torch.equal(a, b) for a, b in zip(shards, average, strict=True))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "index", "index_removed", "folder_removed"])
def test_damage_falls_back_and_says_so(tmp_path: Path, damage: str) -> None:
    pool(2).run(save_step, str(tmp_path), 10)
    folder = Path(pool(2).run(save_step, str(tmp_path), 20)[0])
    shard, index = folder / "rank_00001.safetensors", folder / "index.json"
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 8)
        reason = "rank_00001.safetensors has"
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
        reason = "rank_00001.safetensors has CRC-32"
    elif damage == "removed":
        shard.unlink()
        reason = "rank_00001.safetensors cannot be read"
    elif damage == "index":
        index.write_text(index.read_text().replace('"step": 20', '"step": 21', 1))
        reason = "index.json does not match its own checksum"
    elif damage == "index_removed":
        index.unlink()
        reason = "index.json is missing"
    else:
        folder.rename(tmp_path / "moved")
        reason = "which `latest` names, is missing"
    (name, step, warnings), (name_1, step_1, warnings_1) = pool(2).run(load_newest_here, str(tmp_path))
    assert (name, step) == (name_1, step_1) == ("step_00000010", 10)
    assert len(warnings) == 1
    assert warnings_1 == []  # said once, by rank 0
    assert "step_00000020" in warnings[0]
    assert reason in warnings[0]
    assert warnings[0].endswith("resuming from step_00000010 instead")
    assert "\n" not in warnings[0]


def test_the_same_step_again_supersedes_a_damaged_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save_step(str(tmp_path), step)
    os.truncate(tmp_path / "step_00000020" / "rank_00000.safetensors", 50)
    assert load_newest_here(str(tmp_path))[1] == 10
    save_step(str(tmp_path), 20)
    assert load_newest_here(str(tmp_path)) == ("step_00000020.2", 20, [])
    assert [p.name for p in find(tmp_path)] == ["step_00000020.2", "step_00000010"]


def test_no_checkpoints_is_none_and_only_broken_ones_an_error(tmp_path: Path) -> None:
    assert load_newest_here(str(tmp_path / "absent")) == (None, None, [])
    for step in (1, 2):
        os.truncate(Path(save_step(str(tmp_path), step)) / "rank_00000.safetensors", 9)
    with pytest.raises(DamagedCheckpoint, match=r"no usable checkpoint in .*step_00000002.*step_00000001"):
        load_newest_here(str(tmp_path))


def test_another_model_is_refused_with_names_and_never_fallen_back_from(tmp_path: Path) -> None:
    path = save_step(str(tmp_path), 1)
    mesh, _, entries = build(features=6)
    with pytest.raises(CheckpointError, match=r"of another model.*shape of .*0.bias is \[5\], the model has \[6\]"):
        load(path, entries, mesh=mesh)
    found = newest_good(tmp_path, mesh=mesh, warn=pytest.fail)
    assert found is not None
    with pytest.raises(CheckpointError, match="of another model") as caught:
        load(found[0], entries, mesh=mesh, index=found[1])
    assert not isinstance(caught.value, DamagedCheckpoint)
    _, network, entries = build()
    others = [
        *(e for e in entries if "momentum/0" not in e.key),
        *replicated_entries("x", {"y": torch.ones(1)}, mesh=mesh),
    ]
    with pytest.raises(
        CheckpointError, match=r"missing \['x/y'\], unexpected \['student/momentum/0.bias', '.*0.weight'\]"
    ):
        load(path, others, mesh=mesh)
    network.module.double()
    with pytest.raises(
        CheckpointError, match=r"dtype of student/buffer/1.running_mean is float32, the model has float64"
    ):
        load(path, network_entries("student", network, mesh=mesh), mesh=mesh)


def test_keeps_the_newest_and_the_one_latest_names(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_step(str(tmp_path), step, keep=2)
    assert [p.name for p in find(tmp_path)] == ["step_00000005", "step_00000004"]
    save_step(str(tmp_path), 3, keep=1)  # resumed from an earlier one: the newest by step stays, latest stays
    assert [p.name for p in find(tmp_path)] == ["step_00000005", "step_00000003"]
    assert load_newest_here(str(tmp_path))[1] == 3


def test_elements_written_twice_or_never_are_refused(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    mesh = build_mesh(device=CPU)
    for ranges in ([(0, 3)], [(0, 4), (3, 6)], [(0, 6), (0, 6)], [(0, 2), (3, 6)]):
        entries = [Entry("w", whole[a:b].clone(), a, (6,), True) for a, b in ranges]
        with pytest.raises(CheckpointError, match=r"entry w of shape \[6\] is not covered exactly once"):
            save(tmp_path, step=1, entries=entries, metadata={}, mesh=mesh, keep=1)
    with pytest.raises(CheckpointError, match="not JSON"):
        save(tmp_path, step=1, entries=[], metadata={"h": float("nan")}, mesh=mesh, keep=1)
    assert list(tmp_path.iterdir()) == []
