"""Files of a run: written whole or not at all, locked against a second process."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from modeling.system.errors import UserError

_PARTIAL = ".partial"


class LockedError(UserError):
    """Another process holds the lock; the message names that process."""


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would lock out a shared folder's other readers
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check(Path(temporary))
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: str | Path, content: object) -> None:
    """Writes plain values as indented JSON, atomically.

    Raises:
        ValueError: for a number that is not finite.
        OSError: as `write_atomically`.
    """
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed process's `write_atomically` left; only under a lock that keeps others from writing."""
    for path in folder.rglob(f".*{_PARTIAL}"):
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
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
