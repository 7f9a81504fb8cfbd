"""The prepared folder: the same bytes each time, verified, and replaced as a whole or not at all."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from modeling.datasets import preparation
from modeling.datasets.preparation import prepare
from modeling.sections import Dataset
from modeling.system.errors import UserError
from modeling.system.files import sampled_sha256_of
from tests.helpers import dataset, inject


def shapes(root: Path, num_images: int = 30) -> Dataset:
    return dataset("shapes", root, num_images=num_images, seed=0)


def test_prepared_files_are_the_same_bytes_each_time(tmp_path):
    digests = []
    for name in ("a", "b"):
        prepare(shapes(tmp_path / name))
        files = (tmp_path / name / "shapes").iterdir()
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"train.npy", "test.npy", "manifest.json"}


def test_training_and_test_images_are_apart(tmp_path):
    prepare(shapes(tmp_path, 200))
    train, test = (np.load(tmp_path / "shapes" / f"{split}.npy") for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_the_manifest_holds_hashes_counts_and_source(tmp_path):
    manifest, is_new = prepare(shapes(tmp_path))
    assert is_new
    assert manifest == json.loads((tmp_path / "shapes" / "manifest.json").read_text())
    entry = manifest["files"]["train.npy"]
    assert entry["sha256"] == hashlib.sha256((tmp_path / "shapes" / "train.npy").read_bytes()).hexdigest()
    assert (entry["count"], entry["shape"], entry["dtype"]) == (30, [30, 3, 32, 32], "uint8")
    assert set(manifest) == {"dataset", "source", "files"}
    assert manifest["dataset"] == {"name": "shapes", "num_images": 30, "seed": 0}


def test_a_second_run_verifies_and_writes_nothing(tmp_path):
    prepare(shapes(tmp_path))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "shapes").iterdir()}
    assert prepare(shapes(tmp_path))[1] is False
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "shapes").iterdir()} == before


def test_a_large_file_is_written_in_parts_as_numpy_would_and_verified_whole_by_a_second_run(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "NUM_TEST_SHAPES", 60)
    monkeypatch.setattr("modeling.system.files._SAMPLE_BYTES", 64)
    expected, _ = prepare(shapes(tmp_path / "whole"))
    monkeypatch.setattr(preparation, "CHUNK_BYTES", 4 * 3072 + 1)
    monkeypatch.setattr(preparation, "LARGE_BYTES", 100_000)  # 30 images are below, 60 are above
    manifest, _ = prepare(shapes(tmp_path))
    path = tmp_path / "shapes" / "test.npy"
    sampled = manifest["files"]["test.npy"].pop("sampled_sha256")
    assert sampled == sampled_sha256_of(path)
    assert manifest == expected
    np.save(tmp_path / "again.npy", np.load(path))
    assert (tmp_path / "again.npy").read_bytes() == path.read_bytes()
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    assert sampled_sha256_of(path) == sampled
    assert prepare(shapes(tmp_path))[1]


@pytest.mark.long
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "other"])
def test_a_damaged_or_other_folder_is_prepared_again(tmp_path, damage):
    folder = tmp_path / "shapes"
    manifest, _ = prepare(shapes(tmp_path))
    content = bytearray((folder / "train.npy").read_bytes())
    if damage == "flip":
        content[5000] ^= 1
        (folder / "train.npy").write_bytes(content)
    elif damage == "cut":
        (folder / "train.npy").write_bytes(content[:-1])
    elif damage == "remove":
        (folder / "test.npy").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        prepare(shapes(tmp_path, 31))
    assert prepare(shapes(tmp_path)) == (manifest, True)
    assert prepare(shapes(tmp_path)) == (manifest, False)
    assert {entry.name for entry in tmp_path.iterdir()} == {"shapes", ".shapes.lock"}  # no leftovers


@pytest.mark.fault("disk")
def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path, monkeypatch):
    prepare(shapes(tmp_path))

    def fail(descriptor):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(preparation.os, "fsync", fail)
    with pytest.raises(UserError, match=r"No space left.*dataset\.root"):
        prepare(shapes(tmp_path, 31))
    monkeypatch.undo()
    assert prepare(shapes(tmp_path))[1] is False
    assert {entry.name for entry in tmp_path.iterdir()} == {"shapes", ".shapes.lock"}


@pytest.mark.fault("disk")
def test_a_disk_that_fails_between_the_two_renamings_leaves_the_old_folder(tmp_path, monkeypatch):
    prepare(shapes(tmp_path))
    replace, calls = os.replace, []

    def fail_once(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(preparation.os, "replace", fail_once)
        prepare(shapes(tmp_path, 31))
    assert prepare(shapes(tmp_path))[1] is False
    assert {entry.name for entry in tmp_path.iterdir()} == {"shapes", ".shapes.lock"}


@pytest.mark.long
@pytest.mark.parametrize("moment", ["before the old one goes", "between the two renamings", "after"])
@pytest.mark.fault("SIGKILL")
def test_leftovers_of_a_killed_preparation_are_removed(tmp_path, monkeypatch, moment):
    prepare(shapes(tmp_path))
    replace, renamings = os.replace, []

    def die(source, target):
        if len(renamings) == {"before the old one goes": 0, "between the two renamings": 1}.get(moment):
            raise KeyboardInterrupt
        renamings.append(source)
        replace(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(preparation.os, "replace", die)
        patch.setattr(preparation.shutil, "rmtree", lambda *args, **options: None)  # as a killed process
        prepare(shapes(tmp_path, 31))
    assert list(tmp_path.glob(".shapes.new*"))
    prepare(shapes(tmp_path, 31))
    assert {entry.name for entry in tmp_path.iterdir()} == {"shapes", ".shapes.lock"}
    assert len(np.load(tmp_path / "shapes" / "train.npy")) == 31


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"Permission denied.*dataset\.root"):
        prepare(shapes(tmp_path, 3))


@pytest.mark.fault("file system")
def test_a_file_system_without_fsync_or_modes_is_no_failure(tmp_path, monkeypatch):
    inject(monkeypatch, "fsync", "EINVAL")
    inject(monkeypatch, "chmod", "EPERM")
    assert prepare(shapes(tmp_path, 3))[1]
    assert not prepare(shapes(tmp_path, 3))[1]
