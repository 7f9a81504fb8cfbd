"""Data preparation: exact results, verified sources, and every way in which it can go wrong."""

import codecs
import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from modeling import cifar10
from modeling.datasets.cifar10 import PreparationError, download, read_members, unpickle_batch
from modeling.datasets.preparation import prepare
from modeling.datasets.shapes import draw_shapes
from tests.helpers import ROOT

# ---- shapes


def test_shapes_are_a_function_of_seed_and_number():
    images = draw_shapes(0, 0, 20)
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(draw_shapes(0, 5, 3), images[5:8])
    assert (draw_shapes(1, 0, 20) != images).any()


def test_a_shape_is_one_saturated_thing_on_a_plain_grey_ground():
    for image in draw_shapes(0, 0, 50).astype(int):
        ground = image[:, 0, 0]
        assert ground.max() == ground.min()  # grey
        saturation = image.max(axis=0) - image.min(axis=0)
        is_shape = saturation > 90
        assert 0.05 < is_shape.mean() < 0.35
        rows, columns = is_shape.any(axis=1), is_shape.any(axis=0)
        for line in (rows, columns):  # one thing: its shadow on either axis has no gap
            assert np.abs(np.diff(line.astype(int))).sum() == 2


def test_edges_are_anti_aliased():
    values = {len(np.unique(image.reshape(3, -1), axis=1).T) for image in draw_shapes(0, 0, 5)}
    assert min(values) > 4


def test_prepared_files_are_the_same_bytes_each_time(tmp_path):
    digests = []
    for name in ("a", "b"):
        prepare("shapes", tmp_path / name, num_images=30, seed=0)
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / name).iterdir()})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"train.npy", "test.npy", "manifest.json"}


def test_training_and_test_images_are_apart(tmp_path):
    prepare("shapes", tmp_path / "a", num_images=200, seed=0)
    train, test = (np.load(tmp_path / "a" / f"{split}.npy") for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_the_manifest_tells_hashes_counts_and_source(tmp_path):
    manifest, is_new = prepare("shapes", tmp_path / "a", num_images=30, seed=0)
    assert is_new
    assert manifest == json.loads((tmp_path / "a" / "manifest.json").read_text())
    entry = manifest["files"]["train.npy"]
    assert entry["sha256"] == hashlib.sha256((tmp_path / "a" / "train.npy").read_bytes()).hexdigest()
    assert (entry["count"], entry["shape"], entry["dtype"]) == (30, [30, 3, 32, 32], "uint8")
    assert manifest["source"]


def test_a_second_run_verifies_and_writes_nothing(tmp_path):
    prepare("shapes", tmp_path / "a", num_images=30, seed=0)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").iterdir()}
    assert prepare("shapes", tmp_path / "a", num_images=30, seed=0)[1] is False
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "a").iterdir()} == before


@pytest.mark.long
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "other"])
def test_what_is_not_as_prepared_is_prepared_again(tmp_path, damage):
    folder = tmp_path / "a"
    manifest, _ = prepare("shapes", folder, num_images=30, seed=0)
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
        prepare("shapes", folder, num_images=31, seed=0)
    assert prepare("shapes", folder, num_images=30, seed=0) == (manifest, True)
    assert prepare("shapes", folder, num_images=30, seed=0) == (manifest, False)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", ".a.lock"}  # no leftovers


@pytest.mark.fault("disk")
def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    prepare("shapes", folder, num_images=30, seed=0)

    def fail(descriptor):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("modeling.datasets.preparation.os.fsync", fail)
    with pytest.raises(PreparationError, match=r"No space left.*dataset\.root"):
        prepare("shapes", folder, num_images=31, seed=0)
    monkeypatch.undo()
    assert prepare("shapes", folder, num_images=30, seed=0)[1] is False
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", ".a.lock"}


# ---- CIFAR-10: a small archive of the same form, with its hashes in the place of the official ones


def batch(count: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": pixels, b"labels": [0] * count}, protocol=2)


CONTENTS = {f"data_batch_{n}": batch(4, n) for n in range(1, 6)} | {
    "test_batch": batch(3, 9),
    "batches.meta": pickle.dumps({b"label_names": []}, protocol=2),
}


def write_archive(path: Path, contents: dict[str, bytes], extra: tarfile.TarInfo | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        if extra:
            tar.addfile(extra, io.BytesIO(bytes(extra.size)))
        for name, content in contents.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def admit_small_cifar10(setattr) -> None:
    """Lets the small archive pass for the real one: NumPy 2's name of _reconstruct, and the hashes."""
    setattr(cifar10, "MEMBER_SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()})
    admitted = cifar10._ArrayUnpickler._ADMITTED
    setattr(
        cifar10._ArrayUnpickler,
        "_ADMITTED",
        admitted
        | {
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("_codecs", "encode"): codecs.encode,
        },
    )


@pytest.fixture
def small_cifar10(monkeypatch):
    admit_small_cifar10(monkeypatch.setattr)


@pytest.fixture
def archive(tmp_path, small_cifar10) -> Path:
    return write_archive(tmp_path / "archive.tar.gz", CONTENTS)


def prepare_cifar10(tmp_path, archive, urls=()):
    return prepare("cifar10", tmp_path / "data" / "cifar10", archive=archive, urls=list(urls))


def test_an_archive_becomes_arrays_in_its_order(tmp_path, archive):
    manifest, _ = prepare_cifar10(tmp_path, archive)
    train = np.load(tmp_path / "data" / "cifar10" / "train.npy")
    expected = np.concatenate(
        [np.random.default_rng(n).integers(0, 256, (4, 3072), dtype=np.uint8) for n in range(1, 6)]
    )
    np.testing.assert_array_equal(train, expected.reshape(20, 3, 32, 32))
    assert manifest["files"]["test.npy"]["count"] == 3


def test_num_images_takes_the_first_and_refuses_more_than_there_are(tmp_path, archive):
    folder = tmp_path / "data" / "cifar10"
    manifest, _ = prepare("cifar10", folder, archive=archive, urls=[], num_images=6)
    assert manifest["files"]["train.npy"]["count"] == 6
    with pytest.raises(PreparationError, match=r"num_images must be at most 20 .* got 21"):
        prepare("cifar10", folder, archive=archive, urls=[], num_images=21)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "member", "missing"])
@pytest.mark.fault("hostile archive")
def test_a_damaged_or_altered_archive_is_refused_with_the_remedy(tmp_path, archive, damage):
    content = archive.read_bytes()
    if damage == "cut":
        archive.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        archive.write_bytes(b"")
    elif damage == "text":
        archive.write_text("<html>not found</html>")
    elif damage == "member":
        write_archive(archive, CONTENTS | {"data_batch_3": batch(4, 33)})
    else:
        write_archive(archive, {name: content for name, content in CONTENTS.items() if name != "test_batch"})
    with pytest.raises(PreparationError, match=r"archive\.tar\.gz.*set dataset\.archive"):
        prepare_cifar10(tmp_path, archive)
    assert not (tmp_path / "data").exists()


class Payload:
    """Unpickled without care, this creates a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("has_official_hash", [False, True])
@pytest.mark.fault("hostile archive")
def test_a_pickle_payload_is_not_executed(tmp_path, small_cifar10, monkeypatch, has_official_hash):
    """Refused by its hash, and were that right, by the unpickler."""
    canary = tmp_path / "canary"
    evil = pickle.dumps({b"data": Payload(canary)}, protocol=2)
    if has_official_hash:
        monkeypatch.setitem(cifar10.MEMBER_SHA256, "data_batch_1", hashlib.sha256(evil).hexdigest())
    archive = write_archive(tmp_path / "evil.tar.gz", CONTENTS | {"data_batch_1": evil})
    with pytest.raises(PreparationError if not has_official_hash else pickle.UnpicklingError):
        prepare_cifar10(tmp_path, archive)
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
def test_hostile_members_are_refused_and_nothing_is_written(tmp_path, small_cifar10, extra):
    folder = tmp_path / "inside"
    folder.mkdir()
    archive = write_archive(folder / "hostile.tar.gz", CONTENTS, extra)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PreparationError, match="hostile.tar.gz"):
        read_members(archive)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/ddpm-outside").exists()


# ---- download


@pytest.fixture
def server(archive):
    """Serves the archive at /whole, its first half as if it were all at /cut (of the true length), else 404."""
    content = archive.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in ("/whole", "/cut"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if self.path == "/whole" else content[: len(content) // 2])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as instance:
        thread = threading.Thread(target=instance.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{instance.server_port}"
        instance.shutdown()
        thread.join()


def test_a_missing_archive_is_downloaded_with_a_bar(tmp_path, archive, server, capsys):
    target = tmp_path / "downloads" / "cifar.tar.gz"
    prepare_cifar10(tmp_path, target, [f"{server}/missing", f"{server}/whole"])
    assert target.read_bytes() == archive.read_bytes()
    assert {entry.name for entry in target.parent.iterdir()} == {target.name, f".{target.name}.lock"}
    assert "downloading" in capsys.readouterr().err


@pytest.mark.fault("hostile archive")
def test_a_part_is_never_taken_for_the_whole(tmp_path, server):
    target = tmp_path / "downloads" / "cifar.tar.gz"
    with pytest.raises(PreparationError, match=r"the connection ended after \d+ of \d+ bytes.*dataset\.archive"):
        prepare_cifar10(tmp_path, target, [f"{server}/cut"])
    assert [entry.name for entry in target.parent.iterdir()] == [f".{target.name}.lock"]


TWO_AT_ONCE = """
import sys
from pathlib import Path
from modeling import cifar10
from tests.datasets.test_preparation import CONTENTS, admit_small_cifar10, prepare_cifar10

admit_small_cifar10(setattr)
prepare_cifar10(Path(sys.argv[1]), Path(sys.argv[2]), [sys.argv[3]])
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
    assert prepare_cifar10(tmp_path, target)[1] is False
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.long
@pytest.mark.parametrize("moment", ["before the old one goes", "between the two renamings", "after"])
@pytest.mark.fault("SIGKILL")
def test_what_a_killed_preparation_left_is_cleared_away(tmp_path, monkeypatch, moment):
    prepare("shapes", tmp_path / "a", num_images=30, seed=0)
    replace, renamings = os.replace, []

    def die(source, target):
        if len(renamings) == {"before the old one goes": 0, "between the two renamings": 1}.get(moment):
            raise KeyboardInterrupt
        renamings.append(source)
        replace(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr("modeling.datasets.preparation.os.replace", die)
        patch.setattr(
            "modeling.datasets.preparation.shutil.rmtree", lambda *args, **options: None
        )  # as a killed process
        prepare("shapes", tmp_path / "a", num_images=31, seed=0)
    assert list(tmp_path.glob(".a.new.*"))
    prepare("shapes", tmp_path / "a", num_images=31, seed=0)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", ".a.lock"}
    assert len(np.load(tmp_path / "a" / "train.npy")) == 31


@pytest.mark.fault("hostile archive")
def test_without_network_the_error_names_every_address_and_the_remedy(tmp_path, server):
    closed = "http://127.0.0.1:9/closed"
    with pytest.raises(PreparationError) as caught:
        download([closed, f"{server}/nothing"], tmp_path / "cifar.tar.gz")
    for part in (
        closed,
        "404",
        "put the archive cifar-10-python.tar.gz of https://www.cs.toronto.edu",
        "dataset.archive",
    ):
        assert part in str(caught.value)


@pytest.mark.fault("disk")
def test_a_full_disk_while_downloading_is_an_error_and_leaves_no_part(tmp_path, server, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cifar10.os, "fsync", fail)
    with pytest.raises(PreparationError, match="No space left on device"):
        download([f"{server}/whole"], tmp_path / "d" / "cifar.tar.gz")
    assert list((tmp_path / "d").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PreparationError, match=r"Permission denied.*dataset\.root"):
        prepare("shapes", tmp_path / "a", num_images=3, seed=0)


# ---- the real data


@pytest.mark.data
@pytest.mark.slow
def test_real_cifar10_is_prepared_exactly(tmp_path, cifar10_archive):
    manifest, _ = prepare("cifar10", tmp_path / "cifar10", archive=cifar10_archive, urls=[])
    assert {name: entry["count"] for name, entry in manifest["files"].items()} == {
        "train.npy": 50_000,
        "test.npy": 10_000,
    }
    assert (
        manifest["files"]["train.npy"]["sha256"] == "cca17af9c1cff570c8c91fdb9f8bfc450d62dc4ff73ba6fb849b2b49e0c668f2"
    )
    assert manifest["files"]["test.npy"]["sha256"] == "efbfa3b24c4f91c6febe8a57d87b6448f2c1226d8b2aa24d14db1eea85ad46c6"
    train = np.load(tmp_path / "cifar10" / "train.npy", mmap_mode="r")
    # the channel means everyone knows: 0.4914, 0.4822, 0.4465
    np.testing.assert_allclose(train.mean(axis=(0, 2, 3)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
