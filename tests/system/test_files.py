"""Files are written whole or not at all, whatever the disk does; locks die with their process."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling.system.errors import UserError
from modeling.system.files import (
    LockedError,
    check_writable,
    is_locked,
    locked,
    remove_partial_files,
    write_atomically,
)
from tests.helpers import ROOT, inject

FAULTS = {"write": "ENOSPC", "fsync": "EIO", "replace": "EACCES", "open": "EROFS"}


@pytest.mark.parametrize("call", FAULTS)
@pytest.mark.fault("disk")
def test_a_failing_disk_leaves_what_was_there_and_the_error_names_the_path(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_atomically(path, b"before")
    inject(monkeypatch, call, FAULTS[call])
    with pytest.raises(OSError, match=r"a\.txt") as caught:
        write_atomically(path, b"after")
    assert (errno.errorcode[caught.value.errno], caught.value.filename) == (FAULTS[call], str(path))
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_checked_before_it_takes_its_place(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"before")

    def reject(written: Path) -> None:
        assert written.read_bytes() == b"after"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_atomically(path, b"after", reject)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("SIGKILL")
def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    code = """
import os, sys
from modeling.system.errors import UserError
from modeling.system.files import write_atomically
write_atomically(sys.argv[1], b"x", check=lambda path: os.kill(os.getpid(), 9))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sub" / "a.pt")], cwd=ROOT)
    assert done.returncode == -9
    (tmp_path / "mine.partial").write_text("precious")
    assert len(list((tmp_path / "sub").iterdir())) == 1
    remove_partial_files(tmp_path)  # what another process may be writing in a folder of its own stays
    assert len(list((tmp_path / "sub").iterdir())) == 1
    remove_partial_files(tmp_path, tmp_path / "sub")
    assert list((tmp_path / "sub").iterdir()) == []
    assert (tmp_path / "mine.partial").exists()


HOLDER = """
import os, sys, time
from pathlib import Path
from modeling.system.errors import UserError
from modeling.system.files import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(path: Path, kind: str = "plain", seconds: float = 30) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind, str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["plain", "fork"])
@pytest.mark.fault("two runs in one folder")
def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path, kind):
    """With `fork`, a child of the killed process lives on, as a loader's worker may for seconds."""
    path = tmp_path / "lock"
    with hold(path, kind) as process:
        with pytest.raises(LockedError, match=f"process {process.pid} is working there"), locked(path):
            pass
        assert is_locked(path)
        process.kill()
        process.wait()
        assert not is_locked(path)
        with locked(path):
            assert path.read_text() == f"{os.getpid()}\n"


def test_a_lock_can_be_waited_for(tmp_path):
    with hold(tmp_path / "lock", seconds=0.5):
        started = time.perf_counter()
        with locked(tmp_path / "lock", wait=True):
            assert time.perf_counter() - started > 0.2


def test_an_error_of_locking_names_the_file(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(OSError, match="lock") as caught, locked(tmp_path / "lock"):
        pass
    assert caught.value.filename == str(tmp_path / "lock")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a.txt", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "ENOSYS"])
@pytest.mark.fault("file system")
def test_a_file_system_without_fsync_is_no_failure(tmp_path, monkeypatch, code):
    inject(monkeypatch, "fsync", code)
    write_atomically(tmp_path / "a.txt", b"x")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"x"]


@pytest.mark.fault("file system")
def test_a_file_system_without_modes_is_no_failure(tmp_path, monkeypatch):
    for name in ("chmod", "fchmod"):
        inject(monkeypatch, name, "EPERM")
    write_atomically(tmp_path / "a.txt", b"x")
    assert (tmp_path / "a.txt").read_bytes() == b"x"


@pytest.mark.fault("disk")
def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        check_writable(tmp_path / "file" / "x.png")
    assert caught.value.filename == str(tmp_path / "file" / "x.png")
    with pytest.raises(UserError, match=r"file: is a file, and a folder is to be written"):
        check_writable(tmp_path / "file", is_folder=True)
    with pytest.raises(UserError, match=r": is a folder, and a file is to be written"):
        check_writable(tmp_path)
    for call in ("open", "write", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as caught:
            inject(patch, call, "ENOSPC")
            check_writable(tmp_path / "new" / "x.png")
        assert caught.value.filename == str(tmp_path / "new" / "x.png")
    check_writable(tmp_path / "new" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
