"""Prepares a data set: `train.npy`, `test.npy` (uint8, (N, 3, 32, 32)) and a manifest in one folder, all or nothing.

Separate from `modeling.data`, so that a change of how batches are made does not prepare the data again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modeling.datasets.cifar10 import PreparationError, load_cifar10
from modeling.datasets.pictures import load_pictures, sha256_of_pictures
from modeling.datasets.shapes import draw_shapes
from modeling.stage import Manifest
from modeling.system.files import locked, npy_bytes, sha256_of
from modeling.system.progress import progress_bar

NUM_SHAPES, NUM_TEST_SHAPES = 20_000, 2_000
SOURCES = {  # where the images come from, not from which disk: the manifest is the same on every machine
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html, python version, each file verified by its SHA-256",
    "shapes": "drawn by the project, modeling/datasets/shapes.py",
    "folder": "pictures of a folder, each its centre square reduced to 32x32 (Lanczos)",
}
_TEST_SHAPES_START = 1 << 30  # shapes far behind any training image of the same seed


def _draw_shapes(seed: int, first: int, count: int, desc: str) -> np.ndarray:
    chunk = 250
    starts = range(first, first + count, chunk)
    chunks = [draw_shapes(seed, at, min(chunk, first + count - at)) for at in progress_bar(starts, desc=desc)]
    return np.concatenate(chunks)


def _load(
    name: str,
    archive: Path | None,
    urls: Sequence[str] | None,
    pictures: Path | None,
    num_images: int | None,
    seed: int | None,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Training images, test images, and what the manifest tells of where they come from beside `SOURCES`."""
    facts = {}
    if name == "shapes":
        train = _draw_shapes(seed, 0, num_images or NUM_SHAPES, "drawing training images")
        test = _draw_shapes(seed, _TEST_SHAPES_START, NUM_TEST_SHAPES, "drawing test images")
        return train, test, facts
    if name == "folder":
        train, test, facts["pictures"] = load_pictures(pictures)
    else:
        train, test = load_cifar10(archive, urls)
    if num_images is not None and num_images > len(train):
        raise PreparationError(f"dataset.num_images must be at most {len(train)} for {name}, got {num_images}")
    return train[:num_images], test, facts


def _is_valid(folder: Path, wanted: dict, pictures: Path | None) -> bool:
    """Whether the folder holds what is wanted, every byte of it, made from the pictures as they are now."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["dataset"] != wanted or set(manifest["files"]) != {"train.npy", "test.npy"}:
            return False
        for name, entry in manifest["files"].items():
            if sha256_of(folder / name) != entry["sha256"]:
                return False
        return pictures is None or manifest["pictures"]["sha256"] == sha256_of_pictures(pictures)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _leftovers(folder: Path) -> list[Path]:
    """What a killed process has left of making `folder`; also what another one is making, which holds the lock."""
    return list(folder.parent.glob(f".{folder.name}.new.*"))


def _replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Puts a folder with these files in the place of `folder`; until the last moment the old one stays."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.new."))
    old = temporary.with_name(temporary.name + ".old")
    try:
        temporary.chmod(0o755)
        for name, content in files.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _files(wanted: dict, train: np.ndarray, test: np.ndarray, facts: dict) -> dict[str, bytes]:
    """What the folder will hold: both arrays, and the manifest that describes them."""
    arrays = {"train.npy": train, "test.npy": test}
    files = {file: npy_bytes(array) for file, array in arrays.items()}
    manifest: Manifest = {
        "dataset": wanted,
        "source": SOURCES[wanted["name"]],
        **facts,
        "files": {
            file: {
                "sha256": hashlib.sha256(files[file]).hexdigest(),
                "count": len(array),
                "shape": list(array.shape),
                "dtype": str(array.dtype),
            }
            for file, array in arrays.items()
        },
    }
    return files | {"manifest.json": (json.dumps(manifest, indent=2) + "\n").encode()}


def prepare(
    name: str,
    folder: Path,
    *,
    archive: Path | None = None,
    urls: Sequence[str] | None = None,
    pictures: str | None = None,
    repository: Path = Path(),
    num_images: int | None = None,
    seed: int | None = None,
) -> tuple[Manifest, bool]:
    """Prepares a data set in `folder`, or verifies that it is there already.

    Args:
        name: "cifar10", "shapes" or "folder".
        folder: gets train.npy, test.npy and manifest.json; what it held before is replaced as a whole.
        archive: of cifar10; downloaded there when it is missing.
        urls: of cifar10's archive, tried in turn.
        pictures: of folder: where they lie, as the manifest is to name it.
        repository: where a relative `pictures` begins.
        num_images: training images, the first ones; None for all of the archive or the pictures, or 20,000 shapes.
        seed: of shapes.

    Returns:
        The manifest, and whether anything was written.

    Raises:
        PreparationError: when the data cannot be had or stored, with the remedy; what was there before stays.
    """
    wanted = {"name": name, "num_images": num_images, "seed": seed}
    pictures_folder = None
    if pictures is not None:
        wanted["pictures"], pictures_folder = pictures, repository / pictures
    try:
        is_valid = _is_valid(folder, wanted, pictures_folder)
        if not is_valid:
            files = _files(wanted, *_load(name, archive, urls, pictures_folder, num_images, seed))
        if not is_valid or _leftovers(folder):
            with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
                for leftover in _leftovers(folder):
                    shutil.rmtree(leftover)
                if not is_valid:
                    _replace_folder(folder, files)
    except OSError as error:
        place = error.filename or folder
        raise PreparationError(
            f"{place}: {error.strerror or error}: free some space or change its permissions, "
            "or set dataset.root (prepared data) or dataset.archive (the archive) to another place"
        ) from error
    return json.loads((folder / "manifest.json").read_text()), not is_valid
