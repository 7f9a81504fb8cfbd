"""Files that hold a model: exact, and complete or not there at all."""

import copy
import math
import os

import pytest
import torch
from torch import nn
from torch.optim import Adam

from modeling import checkpoint
from modeling.checkpoint import CheckpointError, export_weights, load_checkpoint, load_fitting, load_weights
from tests.checkpoints import save


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
    "optimizer.state.0.exp_avg": lambda m, _, optimizer, __: optimizer.state[m.weight]["exp_avg"].fill_(-math.inf),
    "state.step": lambda model, ema, optimizer, state: setattr(state, "step", math.nan),
}


@pytest.mark.parametrize("name", NON_FINITE)
@pytest.mark.fault("not finite")
def test_a_value_that_is_not_finite_is_not_saved_and_the_file_stays(tmp_path, name):
    save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=f"{name} is not finite: not saved, .*last.pt is unchanged"):
        save(tmp_path / "last.pt", NON_FINITE[name])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("name", NON_FINITE)
@pytest.mark.fault("damaged checkpoint")
def test_a_value_that_is_not_finite_is_not_loaded(tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_non_finite", lambda value, name: None)
        save(tmp_path / "last.pt", NON_FINITE[name])
    with pytest.raises(CheckpointError, match=f"{name} is not finite"):
        load_checkpoint(tmp_path / "last.pt")


def test_large_finite_values_are_finite(tmp_path):
    save(tmp_path / "last.pt", lambda model, ema, optimizer, state: model.weight.data.fill_(3e38))
    assert load_checkpoint(tmp_path / "last.pt")["model"]["weight"].max() == 3e38


@pytest.mark.fault("disk")
def test_a_disk_that_does_not_return_what_was_written_is_an_error(tmp_path, monkeypatch):
    save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    fsync = os.fsync

    def forget(handle):
        fsync(handle)
        os.pwrite(handle, b"?", 200)

    monkeypatch.setattr(os, "fsync", forget)
    with pytest.raises(CheckpointError, match=r"last\.pt: the disk does not return what was written"):
        save(tmp_path / "last.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


def test_loaded_moments_get_the_memory_layout_of_the_weights():
    """The fused kernel reads both in memory order and would silently pair the wrong numbers."""

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


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    with pytest.raises(FileNotFoundError) as caught:
        load_weights(path)
    assert caught.value.filename == str(path)
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        load_weights(path)
    assert caught.value.filename == str(path)
