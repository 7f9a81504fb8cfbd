"""CIFAR-10's archive: verified before anything in it is trusted, downloaded whole or not at all."""

import hashlib
import lzma
import pickle
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from modeling.datasets import cifar10
from modeling.datasets.cifar10 import download, read_members, unpickle_batch
from modeling.datasets.preparation import prepare
from modeling.system.errors import UserError
from tests.datasets.archives import CONTENTS, batch, small, write_archive
from tests.helpers import ROOT, Payload, ended_after


@pytest.mark.parametrize("num_images", [None, 20, 6])
def test_an_archive_becomes_arrays_in_its_order(tmp_path, archive, num_images):
    manifest, _ = prepare(small(tmp_path, archive, num_images=num_images))
    train = np.load(tmp_path / "cifar10" / "train.npy")
    expected = np.concatenate(
        [np.random.default_rng(n).integers(0, 256, (4, 3072), dtype=np.uint8) for n in range(1, 6)]
    )
    np.testing.assert_array_equal(train, expected.reshape(20, 3, 32, 32)[:num_images])
    assert manifest["files"]["test.npy"]["count"] == 3


def test_more_images_than_available_are_rejected(tmp_path, archive):
    with pytest.raises(UserError, match=r"num_images must be at most 20 .* got 21"):
        prepare(small(tmp_path, archive, num_images=21))


def test_a_relative_archive_is_in_the_original_repository(tmp_path, archive, monkeypatch):
    """As in DVC's temporary copy, whose own folder holds no downloads."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert prepare(small(tmp_path, Path(archive.name)))[0]["files"]["train.npy"]["count"] == 20


@pytest.fixture
def unpacked(tmp_path, small_cifar10) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    (folder / "readme.html").write_text("")
    return folder


def test_the_unpacked_folder_gives_the_same_images(tmp_path, archive, unpacked):
    expected, _ = prepare(small(tmp_path / "a", archive))
    assert prepare(small(tmp_path / "b", unpacked))[0] == expected


@pytest.mark.fault("hostile archive")
def test_an_altered_file_of_the_unpacked_folder_is_rejected(tmp_path, unpacked):
    (unpacked / "data_batch_3").write_bytes(batch(4, 33))
    with pytest.raises(UserError, match=r"data_batch_3 is not the official file .*: get the archive .*and set"):
        prepare(small(tmp_path, unpacked))


@pytest.mark.fault("wrong input")
def test_a_folder_of_another_kind_is_no_archive_and_nothing_is_downloaded_over_it(tmp_path):
    with pytest.raises(UserError, match=r"there is no data_batch_1 in it: get the archive .*cifar-10-batches-py is$"):
        prepare(small(tmp_path / "data", tmp_path))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "zeros", "member", "missing"])
@pytest.mark.fault("hostile archive")
def test_a_damaged_or_altered_archive_is_rejected_with_the_remedy(tmp_path, archive, damage):
    content = archive.read_bytes()
    if damage == "cut":
        archive.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        archive.write_bytes(b"")
    elif damage == "text":
        archive.write_text("<html>not found</html>")
    elif damage == "zeros":  # in the middle of what is compressed
        archive.write_bytes(content[:2000] + bytes(2000) + content[4000:])
    elif damage == "member":
        write_archive(archive, CONTENTS | {"data_batch_3": batch(4, 33)})
    else:
        write_archive(archive, {name: content for name, content in CONTENTS.items() if name != "test_batch"})
    with pytest.raises(UserError, match=r"archive\.tar\.gz.*set dataset\.archive"):
        prepare(small(tmp_path / "data", archive))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("error", [zlib.error, lzma.LZMAError])
@pytest.mark.fault("hostile archive")
def test_damage_inside_a_member_is_named_whatever_the_compression_says(tmp_path, archive, monkeypatch, error):
    monkeypatch.setattr(tarfile.ExFileObject, "read", ended_after(print, 0, error("invalid distance")))
    with pytest.raises(UserError, match=r"cannot be read \(invalid distance\).*set dataset\.archive"):
        prepare(small(tmp_path / "data", archive))


@pytest.mark.parametrize("has_official_hash", [False, True])
@pytest.mark.fault("hostile archive")
def test_a_pickle_payload_is_not_executed(tmp_path, small_cifar10, monkeypatch, has_official_hash):
    """Its hash is wrong; and were that right, the unpickler would reject it."""
    canary = tmp_path / "canary"
    evil = pickle.dumps({b"data": Payload(canary)}, protocol=2)
    if has_official_hash:
        monkeypatch.setitem(cifar10.MEMBER_SHA256, "data_batch_1", hashlib.sha256(evil).hexdigest())
    archive = write_archive(tmp_path / "evil.tar.gz", CONTENTS | {"data_batch_1": evil})
    with pytest.raises(UserError if not has_official_hash else pickle.UnpicklingError):
        prepare(small(tmp_path, archive))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "numpy.load", "numpy.ndarray.tofile"])
@pytest.mark.fault("hostile archive")
def test_the_unpickler_admits_arrays_only(name):
    module, _, attribute = name.rpartition(".")
    with pytest.raises((pickle.UnpicklingError, AttributeError), match=attribute):
        unpickle_batch(f"c{module}\n{attribute}\n.".encode())


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    "extra",
    [
        member("../outside", size=3),
        member("/tmp/ddpm-outside", size=3),
        member("cifar-10-batches-py/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("cifar-10-batches-py/hard", tarfile.LNKTYPE, "../../outside"),
        member("cifar-10-batches-py/device", tarfile.CHRTYPE),
        member("cifar-10-batches-py/bomb", size=50_000_000),
    ],
    ids=["parent", "absolute", "symlink", "hardlink", "device", "bomb"],
)
@pytest.mark.fault("hostile archive")
def test_hostile_members_are_rejected_and_nothing_is_written(tmp_path, small_cifar10, extra):
    folder = tmp_path / "inside"
    folder.mkdir()
    archive = write_archive(folder / "hostile.tar.gz", CONTENTS, extra)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="hostile.tar.gz"):
        read_members(archive)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/ddpm-outside").exists()


# ---- download


def test_a_missing_archive_is_downloaded_with_a_bar(tmp_path, archive, server, capsys):
    target = tmp_path / "downloads" / "cifar.tar.gz"
    prepare(small(tmp_path, target, [f"{server}/missing", f"{server}/whole"]))
    assert target.read_bytes() == archive.read_bytes()
    assert {entry.name for entry in target.parent.iterdir()} == {target.name, f".{target.name}.lock"}
    assert "downloading" in capsys.readouterr().err


@pytest.mark.fault("hostile archive")
def test_a_part_is_never_taken_for_the_whole(tmp_path, server):
    target = tmp_path / "downloads" / "cifar.tar.gz"
    with pytest.raises(UserError, match=r"the connection ended after \d+ of \d+ bytes.*dataset\.archive"):
        prepare(small(tmp_path, target, [f"{server}/cut"]))
    assert [entry.name for entry in target.parent.iterdir()] == [f".{target.name}.lock"]


TWO_AT_ONCE = """
import sys
from pathlib import Path
from modeling.datasets.preparation import prepare
from tests.datasets.archives import admit_small_cifar10, small

admit_small_cifar10(setattr)
prepare(small(Path(sys.argv[1]), Path(sys.argv[2]), [sys.argv[3]]))
"""


@pytest.mark.long
@pytest.mark.fault("hostile archive")
def test_two_downloads_at_once_make_one_valid_copy(tmp_path, archive, server):
    target = tmp_path / "downloads" / "cifar.tar.gz"
    command = [sys.executable, "-c", TWO_AT_ONCE, str(tmp_path), str(target), f"{server}/whole"]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("downloading" in output for output in outputs) == 1
    assert target.read_bytes() == archive.read_bytes()
    assert prepare(small(tmp_path, target))[1] is False
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.fault("hostile archive")
def test_an_error_without_network_names_every_address_and_the_remedy(tmp_path, server):
    closed, strange = "http://127.0.0.1:9/closed", "http://127.0.0.1:9/a b"  # http.client's own error
    with pytest.raises(UserError) as caught:
        download([closed, strange, f"{server}/nothing"], tmp_path / "cifar.tar.gz")
    remedy = "put the archive cifar-10-python.tar.gz of https://www.cs.toronto.edu"
    for part in (closed, strange, "404", remedy, "dataset.archive"):
        assert part in str(caught.value)


@pytest.mark.fault("disk")
def test_a_full_disk_while_downloading_is_an_error_and_leaves_no_part(tmp_path, server, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cifar10.os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        download([f"{server}/whole"], tmp_path / "d" / "cifar.tar.gz")
    assert list((tmp_path / "d").iterdir()) == []


# ---- the real data


@pytest.mark.data
@pytest.mark.slow
def test_real_cifar10_is_prepared_exactly(tmp_path, cifar10_archive):
    manifest, _ = prepare(small(tmp_path, cifar10_archive))
    assert {name: entry["count"] for name, entry in manifest["files"].items()} == {
        "train.npy": 50_000,
        "test.npy": 10_000,
    }
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        "train.npy": "cca17af9c1cff570c8c91fdb9f8bfc450d62dc4ff73ba6fb849b2b49e0c668f2",
        "test.npy": "efbfa3b24c4f91c6febe8a57d87b6448f2c1226d8b2aa24d14db1eea85ad46c6",
    }
    train = np.load(tmp_path / "cifar10" / "train.npy", mmap_mode="r")
    # the channel means everyone knows: 0.4914, 0.4822, 0.4465
    np.testing.assert_allclose(train.mean(axis=(0, 2, 3)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
