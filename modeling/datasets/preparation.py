"""Prepares a data set: `train.npy`, `test.npy` (uint8, (N, 3, 32, 32)) and a manifest in one folder, all or nothing.

Separate from `modeling.data`, so that a change of how batches are made does not prepare the data again.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from modeling.datasets.cifar10 import load_cifar10
from modeling.datasets.pictures import load_pictures, sha256_of_pictures
from modeling.datasets.shapes import draw_shapes
from modeling.sections import Dataset
from modeling.stage import Facts, Manifest, load_manifest, repository
from modeling.system.errors import UserError
from modeling.system.files import locked, npy_bytes, sha256_of, write_atomically
from modeling.system.progress import progress_bar

NUM_SHAPES, NUM_TEST_SHAPES = 20_000, 2_000
SOURCES = {  # where the images come from, not from which disk: the manifest is the same on every machine
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html, python version, each file verified by its SHA-256",
    "shapes": "drawn by the project, modeling/datasets/shapes.py",
    "folder": "pictures of a folder, each its centre square reduced to 32x32 (Lanczos)",
}
_TEST_SHAPES_START = 1 << 30  # shapes far behind any training image of the same seed


# ---- the three data sets: training images, test images, and what the manifest says of them beside their source


def _load_cifar10(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, Facts]:
    assert dataset.archive is not None
    assert dataset.urls is not None
    (train, test), _ = load_cifar10(repository() / dataset.archive, dataset.urls)
    return train, test, {}


def _load_shapes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, Facts]:
    assert dataset.seed is not None
    num_train = NUM_SHAPES if dataset.num_images is None else dataset.num_images
    train = _draw_shapes(dataset.seed, 0, num_train, "drawing training images")
    test = _draw_shapes(dataset.seed, _TEST_SHAPES_START, NUM_TEST_SHAPES, "drawing test images")
    return train, test, {}


def _draw_shapes(seed: int, first: int, count: int, desc: str) -> np.ndarray:
    chunk = 250
    starts = range(first, first + count, chunk)
    chunks = [draw_shapes(seed, at, min(chunk, first + count - at)) for at in progress_bar(starts, desc=desc)]
    return np.concatenate(chunks)


def _load_folder(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, Facts]:
    folder, skip = pictures_folder(dataset), dataset.skip_unusable is True
    train, test, facts = load_pictures(folder, unusable_list(dataset), skip_unusable=skip)
    return train, test, {"pictures": facts}


def pictures_folder(dataset: Dataset) -> Path:
    """Where the pictures of dataset=folder are."""
    assert dataset.pictures is not None
    return repository() / dataset.pictures


def unusable_list(dataset: Dataset) -> Path:
    """The file, beside the prepared data, that lists the pictures that cannot be used."""
    return dataset.folder.with_suffix(".unusable.txt")


_LOADERS = {"cifar10": _load_cifar10, "shapes": _load_shapes, "folder": _load_folder}


# ---- the folder


def _wanted(dataset: Dataset) -> dict[str, Any]:
    """The values that decide which images are in the folder."""
    keys = ("name", "num_images", "seed", *(("pictures",) if dataset.name == "folder" else ()))
    return {key: getattr(dataset, key) for key in keys}


def _is_valid(dataset: Dataset) -> bool:
    """Whether the folder holds what is wanted, every byte of it, made from the pictures as they are now."""
    folder = dataset.folder
    try:
        manifest = load_manifest(folder, "prepare it again")
        if manifest["dataset"] != _wanted(dataset):
            return False
        is_whole = all(sha256_of(folder / name) == entry["sha256"] for name, entry in manifest["files"].items())
        if not is_whole or dataset.name != "folder":
            return is_whole
        pictures = manifest.get("pictures")
        if pictures is None or (pictures["unusable"] and dataset.skip_unusable is not True):
            return False
        return pictures["sha256"] == sha256_of_pictures(pictures_folder(dataset))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _leftovers(folder: Path) -> list[Path]:
    """What a killed process left of a new `folder`; also what another process, which holds the lock, is writing."""
    return list(folder.parent.glob(f".{folder.name}.new*"))


def _replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Replaces `folder` by one with these files; if that fails, the old one stays. Only under the lock."""
    new, old = (folder.with_name(f".{folder.name}.new{suffix}") for suffix in ("", ".old"))
    try:
        for name, content in files.items():
            write_atomically(new / name, content)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


def _files(dataset: Dataset) -> dict[str, bytes]:
    """What the folder will hold: both arrays, and the manifest that describes them."""
    train, test, facts = _LOADERS[dataset.name](dataset)
    if dataset.num_images is not None and dataset.num_images > len(train):
        raise UserError(f"dataset.num_images must be at most {len(train)} for {dataset.name}, got {dataset.num_images}")
    arrays = {"train.npy": train[: dataset.num_images], "test.npy": test}
    files = {file: npy_bytes(array) for file, array in arrays.items()}
    manifest: Manifest = {
        "dataset": _wanted(dataset),
        "source": SOURCES[dataset.name],
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


def prepare(dataset: Dataset) -> tuple[Manifest, bool]:
    """Prepares a data set in its folder, or verifies that it is there already.

    Args:
        dataset: the first `num_images` training images are taken, or all of the archive or the pictures, or 20,000
            shapes. Relative paths of archive and pictures begin at `repository()`.

    Returns:
        The manifest, and whether anything was written. What the folder held before is replaced as a whole.

    Raises:
        UserError: when the data cannot be loaded or stored, with the remedy; what was there before stays.
    """
    folder = dataset.folder
    try:
        files = None if _is_valid(dataset) else _files(dataset)
        if files or _leftovers(folder):
            with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
                for leftover in _leftovers(folder):
                    shutil.rmtree(leftover)
                if files:
                    _replace_folder(folder, files)
    except OSError as error:
        place = error.filename or folder
        raise UserError(
            f"{place}: {error.strerror or error}: free some space or change its permissions, "
            "or set dataset.root (prepared data) or dataset.archive (the archive) to another place"
        ) from error
    return load_manifest(folder, "run prepare_data.py again"), files is not None
