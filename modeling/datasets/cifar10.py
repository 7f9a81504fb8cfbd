"""CIFAR-10 from its archive, or the folder unpacked from it: downloaded if missing, verified before it is trusted.

The archive is a tar of Python pickles. No member is written to disk; each is compared with its official SHA-256 before
it is unpickled, and the unpickler knows the three names that a NumPy array needs and nothing else.
"""

import hashlib
import http.client
import io
import lzma
import os
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy._core.multiarray import _reconstruct  # pyright: ignore[reportAttributeAccessIssue]  # stubs lack it

from modeling.system.errors import UserError
from modeling.system.files import fsync, locked
from modeling.system.progress import progress_bar

MEMBER_SHA256 = {
    "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
    "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
    "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
    "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
    "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
    "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
    "batches.meta": "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
}
Split = tuple[np.ndarray, np.ndarray]  # of training, of test
_FOLDER = "cifar-10-batches-py"
_MAX_MEMBER_BYTES = 40_000_000  # the largest has 31,035,999
_MAX_MEMBERS = 100
_TIMEOUT_SECONDS = 10
_CHUNK_BYTES = 1 << 20


class _ArrayUnpickler(pickle.Unpickler):  # noqa: TID251
    """Admits what an array in a Python 2 pickle consists of; rejects any other name."""

    _ADMITTED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch") from None


def unpickle_batch(content: bytes) -> dict:
    """A batch file's dictionary (keys are bytes).

    Raises:
        pickle.UnpicklingError: for a pickle that names anything but a NumPy array.
    """
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


def _remedy(archive: Path) -> str:
    what = "the archive cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html"
    where = f"set dataset.archive to where it or its unpacked folder {_FOLDER} is"
    if archive.is_dir():  # of whatever kind: nothing to delete
        return f"get {what} and {where}"
    return f"{'delete it and ' if archive.exists() else ''}put {what} at {archive}, or {where}"


def read_members(archive: Path) -> dict[str, bytes]:
    """The contents of the seven data files, each verified by its SHA-256.

    Args:
        archive: the archive, or its unpacked folder.

    Raises:
        UserError: for a damaged archive, a missing or altered member, or one that points outside.
    """
    if archive.is_dir():
        members = {name: (archive / name).read_bytes() for name in MEMBER_SHA256 if (archive / name).is_file()}
    else:
        members = _read_archive(archive)
    for name, expected in MEMBER_SHA256.items():
        if name not in members:
            raise UserError(f"{archive}: there is no {name} in it: {_remedy(archive)}")
        if (digest := hashlib.sha256(members[name]).hexdigest()) != expected:
            wrong = f"{name} is not the official file (SHA-256 {digest}, expected {expected})"
            raise UserError(f"{archive}: {wrong}: {_remedy(archive)}")
    return members


def _read_archive(archive: Path) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, mode="r:*") as tar:
            for count, info in enumerate(tar):
                # The filter rejects what points outside, and devices; it would only make an absolute name relative.
                if tarfile.data_filter(info, str(archive.parent.resolve())).name != info.name:
                    raise UserError(f"{archive}: {info.name} points outside")
                if count >= _MAX_MEMBERS or info.size > _MAX_MEMBER_BYTES:
                    raise UserError(f"{archive}: {info.name} ({info.size} bytes) is too much for CIFAR-10")
                folder, _, name = info.name.partition("/")
                if folder == _FOLDER and name in MEMBER_SHA256 and info.isfile():
                    file = tar.extractfile(info)
                    assert file is not None  # as it is for links and devices only
                    members[name] = file.read()
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{archive} cannot be read ({reason}): {_remedy(archive)}") from error
    return members


def download(urls: Sequence[str], archive: Path) -> None:
    """Downloads the archive from the first address that delivers it whole.

    It grows as `<archive>.part` and takes its name when it is complete.

    Raises:
        UserError: when no address delivers it, with the reason of each.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    reasons = []
    for url in urls:
        try:
            _download_one(url, part)
            os.replace(part, archive)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reasons.append(f"{url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise UserError(f"CIFAR-10 could not be downloaded ({'; '.join(reasons)}): {_remedy(archive)}")


def _download_one(url: str, part: Path) -> None:
    # Any kind of address will do: what it delivers is verified.
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, part.open("wb") as file:  # noqa: S310
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        with progress_bar(total=total, unit="B", unit_scale=True, desc=f"downloading {url}") as bar:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and file.tell() != total:
            raise OSError(f"the connection ended after {file.tell()} of {total} bytes")
        file.flush()
        fsync(file.fileno())


def load_cifar10(archive: Path, urls: Sequence[str]) -> tuple[Split, Split]:
    """The images, (N, 3, 32, 32) uint8, and their classes 0..9, (N,) int64; downloads a missing archive.

    Raises:
        UserError: when the archive is missing and no address delivers it, or it is not the official data.
    """
    if not archive.exists():
        with locked(archive.with_name(f".{archive.name}.lock"), wait=True):
            if not archive.exists():  # now that another process may have downloaded it
                download(urls, archive)
    members = read_members(archive)
    train = [unpickle_batch(members[f"data_batch_{number}"]) for number in range(1, 6)]
    test = unpickle_batch(members["test_batch"])
    images = np.concatenate([batch[b"data"] for batch in train]), test[b"data"]
    labels = np.concatenate([batch[b"labels"] for batch in train]), np.array(test[b"labels"])
    return (images[0].reshape(-1, 3, 32, 32), images[1].reshape(-1, 3, 32, 32)), labels
