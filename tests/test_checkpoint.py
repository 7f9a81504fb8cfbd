"""Files that hold a model: exact, whole, and safe to open."""

import contextlib
import copy
import io
import math
import os
import pickle
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import Adam

from modeling.checkpoint import (
    FORMAT,
    CheckpointError,
    _seal,
    export_weights,
    load_checkpoint,
    load_fitting,
    load_weights,
    save_checkpoint,
)
from tests.helpers import Payload


@dataclass
class State:
    step: int = 3


def save(path, spoil=None):
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = State()
    if spoil is not None:
        spoil(model, ema, optimizer, state)
    about = {"run": "name", "wandb_id": "1"}
    save_checkpoint(path, about=about, config={"seed": 1}, state=state, model=model, ema=ema, optimizer=optimizer)
    return model, ema, optimizer


def seal(path) -> None:
    """Gives a file made by `torch.save` the checksum of a checkpoint, as someone would who means harm."""
    content = io.BytesIO(path.read_bytes())
    _seal(content)
    path.write_bytes(content.getvalue())


def test_a_checkpoint_holds_the_full_state(tmp_path):
    model, ema, optimizer = save(tmp_path / "sub" / "last.pt")
    content = load_checkpoint(tmp_path / "sub" / "last.pt")
    assert (content["config"], content["state"]) == ({"seed": 1}, {"step": 3})
    assert content["about"] == {"run": "name", "wandb_id": "1"}
    assert torch.equal(content["model"]["weight"], model.weight)
    assert torch.equal(content["ema"]["weight"], ema.weight)
    moments = content["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_a_checkpoint_is_an_ordinary_file_of_torch(tmp_path):
    save(tmp_path / "last.pt")
    assert set(torch.load(tmp_path / "last.pt", weights_only=True)) == {
        "format", "about", "config", "state", "model", "ema", "optimizer"
    }  # fmt: skip


def test_the_same_state_is_the_same_bytes_under_any_name(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.manual_seed(0)
        save(tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


NON_FINITE = {
    "model.weight": lambda model, ema, optimizer, state: model.weight.data[1, 2:].fill_(math.nan),
    "ema.bias": lambda model, ema, optimizer, state: ema.bias.data[0:1].fill_(math.inf),
    "optimizer.state.0.exp_avg": lambda model, ema, optimizer, state: optimizer.state[model.weight]["exp_avg"].fill_(
        -math.inf
    ),
    "state.step": lambda model, ema, optimizer, state: setattr(state, "step", math.nan),
}


@pytest.mark.parametrize("name", NON_FINITE)
@pytest.mark.fault("not finite")
def test_what_is_not_finite_is_not_saved_and_leaves_the_file_before_it(tmp_path, name):
    save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=f"{name} is not finite: not saved, .*last.pt is left as it is"):
        save(tmp_path / "last.pt", NON_FINITE[name])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("name", NON_FINITE)
@pytest.mark.fault("damaged checkpoint")
def test_what_is_not_finite_is_not_loaded(tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr("modeling.checkpoint._non_finite", lambda value, name: None)
        save(tmp_path / "last.pt", NON_FINITE[name])
    with pytest.raises(CheckpointError, match=f"{name} is not finite"):
        load_checkpoint(tmp_path / "last.pt")


def test_large_finite_values_are_finite(tmp_path):
    save(tmp_path / "last.pt", lambda model, ema, optimizer, state: model.weight.data.fill_(3e38))
    assert load_checkpoint(tmp_path / "last.pt")["model"]["weight"].max() == 3e38


@pytest.mark.fault("disk")
def test_a_disk_that_does_not_give_back_what_was_written_is_an_error(tmp_path, monkeypatch):
    save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    fsync = os.fsync

    def forget(handle):
        fsync(handle)
        os.pwrite(handle, b"?", 200)

    monkeypatch.setattr("os.fsync", forget)
    with pytest.raises(CheckpointError, match=r"last\.pt: the disk does not give back what was written"):
        save(tmp_path / "last.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


def test_moments_saved_in_another_memory_layout_are_taken_up_in_that_of_the_weights():
    """The fused kernel walks through both in the order of memory and would pair the wrong numbers, without a word."""

    def layer_and_optimizer(layout, is_fused):
        layer = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        layer.load_state_dict(start)
        return layer, Adam(layer.parameters(), lr=0.1, fused=is_fused)

    def take_step(layer, optimizer):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        return layer.weight.detach()

    start, x = nn.Conv2d(3, 4, 3).state_dict(), torch.randn(2, 3, 8, 8)
    plain, plain_optimizer = layer_and_optimizer(torch.contiguous_format, is_fused=False)
    take_step(plain, plain_optimizer)
    start, state = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain_optimizer.state_dict())
    placed, optimizer = layer_and_optimizer(torch.channels_last, is_fused=True)
    load_fitting(optimizer, state, "file")
    assert optimizer.state[placed.weight]["exp_avg"].stride() == placed.weight.stride()
    torch.testing.assert_close(take_step(placed, optimizer), take_step(plain, plain_optimizer))


def test_exported_weights_come_back_with_their_configuration(tmp_path):
    module = nn.Linear(3, 2)
    export_weights(tmp_path / "m.safetensors", module, {"b": 1, "a": [2]})
    config, weights = load_weights(tmp_path / "m.safetensors")
    assert config == {"a": [2], "b": 1}
    assert {name: torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items()} == {
        "weight": True,
        "bias": True,
    }


def test_averaged_weights_are_taken_from_a_full_checkpoint(tmp_path):
    _, ema, _ = save(tmp_path / "last.pt")
    config, weights = load_weights(tmp_path / "last.pt")
    assert config == {"seed": 1}
    assert torch.equal(weights["bias"], ema.bias)


def write_hostile(path, kind: str, canary) -> None:
    """A file that is no checkpoint, of this kind."""
    if kind == "torch pickle":
        torch.save({"format": FORMAT, "config": Payload(canary)}, path)
    elif kind == "sealed torch pickle":
        torch.save({"format": FORMAT, "config": Payload(canary)}, path)
        seal(path)
    elif kind == "legacy torch pickle":
        torch.save({"format": FORMAT, "config": Payload(canary)}, path, _use_new_zipfile_serialization=False)
    elif kind == "legacy tar":
        with tarfile.open(path, "w") as tar:
            for name in ("sys_info", "pickle", "tensors", "storages"):
                content = pickle.dumps(Payload(canary), protocol=2)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(canary), protocol=2))
    elif kind == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
        with contextlib.suppress(AssertionError):  # it may have a comment of its own
            seal(path)
    elif kind == "pt2":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), str(path.with_suffix(".pt2")))
        os.replace(path.with_suffix(".pt2"), path)
        with contextlib.suppress(AssertionError):
            seal(path)
    elif kind == "cut":
        if path.suffix == ".pt":
            save(path)
        else:
            export_weights(path, nn.Linear(3, 2), {})
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "other structure":
        torch.save({"format": FORMAT, "about": {}, "config": [], "state": {}, "model": {}, "ema": {}}, path)
        seal(path)
    else:
        path.write_text({"empty": "", "text": "hello"}[kind])


HOSTILE = [
    "empty", "cut", "text", "pickle", "torch pickle", "sealed torch pickle", "legacy torch pickle", "legacy tar",
    "TorchScript", "pt2", "other structure",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.fault("hostile checkpoint")
def test_what_is_no_checkpoint_is_refused_and_executes_nothing(tmp_path, suffix, kind):
    path, canary = tmp_path / f"model{suffix}", tmp_path / "canary"
    write_hostile(path, kind, canary)
    with pytest.raises(CheckpointError, match="model"):
        load_weights(path)
    assert not canary.exists()


@pytest.mark.fault("hostile checkpoint")
def test_a_zip_bomb_is_refused_at_once_and_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as file:
        for _ in range(300):
            file.write(bytes(1 << 20))
    seal(path)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"bomb\.pt.*compressed"):
        load_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert time.perf_counter() - started < 1


@pytest.mark.fault("hostile checkpoint")
def test_a_bomb_of_overlapping_members_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data", bytes(100_000))
        for number in range(50):  # fifty names for the same bytes
            twin = copy.copy(archive.filelist[0])
            twin.filename = twin.orig_filename = f"a/{number}"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    seal(path)
    with pytest.raises(CheckpointError, match="overlap"):
        load_checkpoint(path)


@pytest.mark.fault("hostile checkpoint")
def test_a_checkpoint_with_an_endless_structure_is_refused(tmp_path):
    torch.save({"format": FORMAT, "config": ["x" * 100 + str(n) for n in range(200_000)]}, tmp_path / "big.pt")
    seal(tmp_path / "big.pt")
    with pytest.raises(CheckpointError, match=r"data\.pkl has \d+ bytes"):
        load_checkpoint(tmp_path / "big.pt")


@pytest.mark.fault("damaged checkpoint")
def test_every_flipped_bit_is_found(tmp_path):
    """Also in padding, headers and the checksum itself; in a third of the positions one of the eight bits."""
    path = tmp_path / "last.pt"
    save(path)
    content = bytearray(path.read_bytes())
    undetected = []
    for position in range(0, len(content), 3):
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            load_checkpoint(path)
            undetected.append(position)
        except CheckpointError:
            pass
        content[position] ^= 1 << position % 8
    assert undetected == []
    path.write_bytes(content)
    load_checkpoint(path)


def test_another_format_or_foreign_file_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    seal(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt: there is no such file"):
        load_weights(tmp_path / "nowhere.pt")
