"""Batches as functions of seed and step, with any number of workers; and what is loaded."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling import data
from modeling.data import Batches, load_images
from modeling.system import files
from modeling.system.errors import UserError
from tests.helpers import random_images

NUMBERED = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1).expand(50, 3, 2, 2).contiguous()


def numbers(batch: torch.Tensor) -> list[int]:
    return batch[:, 0, 0, 0].tolist()


def test_an_epoch_has_no_image_twice_and_epochs_differ():
    batches = Batches(NUMBERED, 8, seed=0)
    assert batches.steps_per_epoch == 6
    epochs = [[n for step in range(first, first + 6) for n in numbers(batches[step])] for first in (0, 6)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 48
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # the images left over wait for another epoch


def test_a_batch_is_a_function_of_seed_and_step():
    whole = [Batches(NUMBERED, 8, seed=3)[step] for step in range(12)]
    one = Batches(NUMBERED, 8, seed=3)
    assert all(torch.equal(one[step], whole[step]) for step in reversed(range(12)))
    assert numbers(Batches(NUMBERED, 8, seed=4)[0]) != numbers(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 4])
def test_any_number_of_workers_gives_the_same_batches(start):
    batches = Batches(random_images(50, 3, 8, 8), 8, seed=0, random_flip=True)
    results = [torch.cat(list(batches.loader(range(start, 9), num_workers))) for num_workers in (0, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_flips_mirror_half_of_the_images_and_leave_the_rest():
    images = random_images(2000, 3, 4, 4)
    plain, flipped = Batches(images, 2000, seed=0)[0], Batches(images, 2000, seed=0, random_flip=True)[0]
    is_flipped = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped[is_flipped], plain[is_flipped].flip(-1))
    assert is_flipped.float().mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("batch_size", [0, 51])
def test_a_batch_size_outside_the_data_is_rejected(batch_size):
    with pytest.raises(ValueError, match=rf"1\.\.50 .* got {batch_size}"):
        Batches(NUMBERED, batch_size, seed=0)


def test_loading_verifies_the_bytes(tmp_path, tiny_data):
    manifest = json.loads((tiny_data / "shapes" / "manifest.json").read_text())
    images = load_images(tiny_data / "shapes", "train", manifest)
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"train.npy is missing: run prepare_data.py"):
        load_images(tmp_path, "train", manifest)
    np.save(tmp_path / "train.npy", np.zeros((64, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        load_images(tmp_path, "train", manifest)


def test_images_stay_in_their_file_which_nobody_writes(tmp_path, tiny_data):
    folder = Path(shutil.copytree(tiny_data / "shapes", tmp_path / "shapes"))
    images = load_images(folder, "train", json.loads((folder / "manifest.json").read_text()))
    before = images.clone()
    with (folder / "train.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([255 - int(before[-1, -1, -1, -1])]))
    assert torch.equal(images[-1] != before[-1], (torch.arange(3 * 32 * 32) == 3 * 32 * 32 - 1).reshape(3, 32, 32))


@pytest.mark.fault("damaged file")
def test_a_large_file_is_verified_by_a_sample_which_finds_what_the_docs_say(tmp_path, monkeypatch, tiny_data):
    monkeypatch.setattr(files, "_SAMPLE_BYTES", 64)  # of 196,736 bytes: a block every 768
    path, whole = tmp_path / "train.npy", (tiny_data / "shapes" / "train.npy").read_bytes()
    path.write_bytes(whole)
    manifest = json.loads((tiny_data / "shapes" / "manifest.json").read_text())
    manifest["files"]["train.npy"] |= {"sampled_sha256": files.sampled_sha256_of(path), "sha256": "not computed"}

    def assert_accepted(content: bytes) -> None:
        path.write_bytes(content)
        assert len(load_images(tmp_path, "train", manifest)) == 64

    assert_accepted(whole)
    stretch = len(whole) // files._NUM_SAMPLES
    inverted = bytes(255 - byte for byte in whole)
    damaged = [whole[:at] + inverted[at : at + stretch] + whole[at + stretch :] for at in (300, 70_000, 195_000)]
    for other in (whole[:-1], whole + b"0", bytes(len(whole)), *damaged):
        with pytest.raises(UserError, match="has changed since it was prepared: run prepare_data.py again"):
            assert_accepted(other)
    assert_accepted(whole[:300] + inverted[300:301] + whole[301:])  # which prepare_data.py finds


class Stuck(Batches):
    """Its workers take a second for step 2; for step 4 they wait for ever, or are killed."""

    is_killed = False

    def __getitem__(self, step):
        if step == 4 and self.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep({2: 1, 4: 100}.get(step, 0))
        return super().__getitem__(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_killed", "reason"),
    [(True, "died"), pytest.param(False, "delivered nothing for 2 s", marks=pytest.mark.long)],
)
@pytest.mark.fault("loader workers")
def test_workers_that_deliver_nothing_end_in_an_error_with_the_remedy(monkeypatch, is_killed, reason):
    monkeypatch.setattr(data, "WAIT_SECONDS", 0.4)
    monkeypatch.setattr(data, "MAX_WAITS", 5)
    batches = Stuck(NUMBERED, 8, seed=0)
    batches.is_killed = is_killed
    delivered = []
    with pytest.raises(
        UserError, match=rf"^the loader workers {reason}, .*docker run --shm-size=1g.*runtime\.num_workers=0"
    ):
        delivered.extend(batches.loader(range(6), 1))
    # Step 2 came after two waits, as after a suspension: no error.
    assert len(delivered) == 4 or (is_killed and len(delivered) == 3)  # the last one may die with the worker
    assert all(map(torch.equal, delivered, map(Batches(NUMBERED, 8, seed=0).__getitem__, range(4))))


def test_an_error_of_a_batch_passes_unchanged(monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Batches, "__getitem__", fail)
    with pytest.raises(RuntimeError, match="^a bug$"):
        next(Batches(NUMBERED, 8, seed=0).loader(range(6)))
