"""Files that are no checkpoint, or a malicious one: each is rejected and none executes code."""

import contextlib
import copy
import io
import os
import pickle
import tarfile
import tracemalloc
import warnings
import zipfile

import pytest
import torch
from torch import nn

from modeling.checkpoint import FORMAT, CheckpointError, export_weights, load_checkpoint, load_weights
from tests.checkpoints import save, seal
from tests.helpers import Payload


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
def test_a_file_that_is_no_checkpoint_is_rejected_and_executes_nothing(tmp_path, suffix, kind):
    path, canary = tmp_path / f"model{suffix}", tmp_path / "canary"
    write_hostile(path, kind, canary)
    with pytest.raises(CheckpointError, match="model"):
        load_weights(path)
    assert not canary.exists()


@pytest.mark.fault("hostile checkpoint")
def test_a_zip_bomb_is_rejected_and_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as file:
        for _ in range(300):
            file.write(bytes(1 << 20))
    seal(path)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"bomb\.pt.*compressed"):
        load_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20  # other threads allocate, too: far below the 300 MiB
    tracemalloc.stop()


@pytest.mark.fault("hostile checkpoint")
def test_a_bomb_of_overlapping_members_is_rejected(tmp_path):
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
def test_a_checkpoint_with_a_huge_structure_is_rejected(tmp_path):
    torch.save({"format": FORMAT, "config": ["x" * 100 + str(n) for n in range(200_000)]}, tmp_path / "big.pt")
    seal(tmp_path / "big.pt")
    with pytest.raises(CheckpointError, match=r"data\.pkl has \d+ bytes"):
        load_checkpoint(tmp_path / "big.pt")


def test_a_file_of_torch_that_is_no_checkpoint_is_rejected(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    seal(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")
