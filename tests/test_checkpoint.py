"""Files that hold a model: exact, whole, and safe to open."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import Adam

from modeling.checkpoint import CheckpointError, export_weights, load_checkpoint, load_weights, save_checkpoint


@dataclass
class State:
    step: int = 3


def save(path):
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(path, config={"seed": 1}, state=State(), model=model, ema=ema, optimizer=optimizer)
    return model, ema, optimizer


def test_a_checkpoint_holds_the_full_state(tmp_path):
    model, ema, optimizer = save(tmp_path / "sub" / "last.pt")
    content = load_checkpoint(tmp_path / "sub" / "last.pt")
    assert (content["config"], content["state"]) == ({"seed": 1}, {"step": 3})
    assert torch.equal(content["model"]["weight"], model.weight)
    assert torch.equal(content["ema"]["weight"], ema.weight)
    moments = content["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_the_same_state_is_the_same_bytes_under_any_name(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.manual_seed(0)
        save(tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


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


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", ["empty", "cut", "text", "pickle", "torch pickle"])
def test_what_is_no_checkpoint_is_refused_and_executes_nothing(tmp_path, suffix, content):
    path, canary = tmp_path / f"model{suffix}", tmp_path / "canary"
    if content == "torch pickle":
        torch.save({"format": 1, "config": Payload(canary)}, path)
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Payload(canary), protocol=2))
    elif content == "cut":
        if suffix == ".pt":
            save(path)
        else:
            export_weights(path, nn.Linear(3, 2), {})
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path.write_text("" if content == "empty" else "hello")
    with pytest.raises(CheckpointError, match="model"):
        load_weights(path)
    assert not canary.exists()


def test_one_flipped_bit_is_found(tmp_path):
    save(tmp_path / "last.pt")
    content = bytearray((tmp_path / "last.pt").read_bytes())
    place = content.index(torch.load(tmp_path / "last.pt", weights_only=True)["ema"]["bias"].numpy().tobytes())
    content[place] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong checksum"):
        load_checkpoint(tmp_path / "last.pt")


def test_another_format_or_foreign_file_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt: there is no such file"):
        load_weights(tmp_path / "nowhere.pt")
