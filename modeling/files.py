"""Files of a run: written whole or not at all; and the version of the code."""

import hashlib
import os
import tempfile
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file as a whole or not at all, creating its folder; a crash leaves what was there before.

    Raises:
        OSError: when the disk refuses; the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would lock out a shared folder's other readers
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def code_sha256() -> str:
    """SHA-256 over main.py and this package's modules: the version of the code that runs, committed or not."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([package.parent / "main.py", *package.glob("*.py")]):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
