"""Files of a run: written whole or not at all, locked against a second process."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modeling.system.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_PARTIAL = ".partial"
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of a large file: 1 MB, and below 3 s on a disk that turns


class LockedError(UserError):
    """Another process holds the lock; the message names that process."""


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Makes an error of the disk inside name `path`, whatever it named before, if anything."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _written_beside(path: Path, content: bytes | memoryview) -> Iterator[Path]:
    """A new file beside `path` with this content, on the disk; at the end it is removed, if it is still there."""
    with naming(path):
        if not path.parent.exists():  # else a file there would be "File exists"
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def write_atomically(
    path: str | Path, content: bytes | memoryview, check: Callable[[Path], None] | None = None
) -> None:
    """Writes a file as a whole or not at all, creating its folder; a crash leaves what was there before.

    Args:
        check: called with the written file before it replaces the old one; if it raises, the old one stays.

    Raises:
        OSError: when the disk fails, naming `path`; the temporary file is removed.
    """
    path = Path(path)
    with _written_beside(path, content) as temporary:
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def check_writable(path: Path, *, is_folder: bool = False) -> None:
    """Finds before the work that its output could not be written after it.

    Args:
        is_folder: a folder will be made, or replaced, at `path`; else a file.

    Raises:
        UserError: if a folder is where the file will be, or the reverse.
        OSError: when a file cannot be written in its folder, or in the nearest one that exists, naming `path`.
    """
    with naming(path):
        if path.exists() and path.is_dir() != is_folder:
            found, wanted = ("file", "folder") if is_folder else ("folder", "file")
            raise UserError(f"{path}: is a {found}, and a {wanted} is to be written: name another one or remove it")
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        with _written_beside(nearest / path.name, b"\0"):
            pass


def write_json(path: str | Path, content: object) -> None:
    """Writes plain values as indented JSON, atomically.

    Raises:
        ValueError: for a number that is not finite.
        OSError: as `write_atomically`.
    """
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def npy_bytes(array: "np.ndarray") -> bytes:
    """An array as the content of a .npy file."""
    import numpy as np  # here, because scripts check their outputs with this module before anything heavy is imported

    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def fsync(handle: int) -> None:
    """`os.fsync` where the file system has it; network and FUSE mounts may lack it, for folders above all."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fsync(handle)
    finally:
        os.close(handle)


def remove_partial_files(*folders: Path) -> None:
    """Removes what a killed process's `write_atomically` left in these; only where no other process writes."""
    for folder in folders:
        for path in folder.glob(f".*{_PARTIAL}"):
            path.unlink()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a file as a lock, creating it; the system frees it when the process ends, in whatever way.

    Args:
        wait: until another process has freed it, instead of raising.

    Raises:
        LockedError: when another process holds it.
        OSError: where it cannot be created or locked, naming `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            # A POSIX lock, of the process: forked loader workers, which may outlive a killed parent, do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, error.strerror, str(path)) from error
            file.seek(0)
            raise LockedError(f"process {file.read().strip() or 'unknown'} is working there") from None
        with naming(path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds a file as a lock; the question keeps nobody out.

    Not for a lock of this process: it would be freed, because a POSIX lock ends when any handle of the file is closed.
    """
    if not path.exists():
        return False
    # struct flock: type, whence, start, length, process; on macOS in another order.
    layout, place = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi", 0)
    fields = [0] * 5
    fields[place] = fcntl.F_WRLCK
    with path.open("rb") as file:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *fields))
    return struct.unpack(layout, answer)[place] != fcntl.F_UNLCK


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256_of(path: Path) -> str:
    """A SHA-256 that is quick for a file of any size: over its size, and 257 blocks of 4 KiB from its start to its end.

    Another file is told apart, as is one that is cut, or damaged over a 256th of its length; a smaller damage is found
    only where it meets a block.
    """
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(num_bytes).encode())
        for number in range(_NUM_SAMPLES + 1):
            file.seek(max(0, num_bytes - _SAMPLE_BYTES) * number // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
