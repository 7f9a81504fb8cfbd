"""Prepares a data set: `train.npy`, `test.npy` (uint8, (N, C, H, W)) and a manifest in one folder, all or nothing.

However many images there are, a few at a time pass through memory (all only of CIFAR-10, whose archive is one piece).
Separate from `modeling.data`, so that a change of how batches are made does not prepare the data again.
"""

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modeling.datasets.cifar10 import load_cifar10
from modeling.datasets.pictures import load_pictures, sha256_of_pictures
from modeling.datasets.shapes import draw_shapes
from modeling.sections import Dataset
from modeling.stage import Facts, FileFacts, Manifest, load_manifest, repository
from modeling.system.errors import UserError
from modeling.system.files import fsync, locked, naming, sampled_sha256_of, sha256_of, sync
from modeling.system.progress import progress_bar
from modeling.system.signals import uninterrupted

NUM_SHAPES, NUM_TEST_SHAPES = 20_000, 2_000
SOURCES = {  # where the images come from, not from which disk: the manifest is the same on every machine
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html, python version, each file verified by its SHA-256",
    "shapes": "drawn by the project, modeling/datasets/shapes.py",
    "folder": "pictures of a folder, each its centre {cut} reduced to {size} (Lanczos)",
}
_TEST_SHAPES_START = 1 << 30  # shapes far behind any training image of the same seed
LARGE_BYTES = 1 << 28  # of a file that a training does not read whole to verify it, which takes half a second at most
CHUNK_BYTES = 1 << 22  # that are written at a time


class Images(NamedTuple):
    """Images that are made when they are written."""

    count: int
    take: Callable[[int, int], np.ndarray]  # (start, stop) -> images start..stop-1, (stop - start, C, H, W) uint8


# ---- the three data sets: training images, test images, and what the manifest says of them beside their source


def _load_cifar10(dataset: Dataset) -> tuple[Images, Images, Facts]:
    assert dataset.archive is not None
    assert dataset.urls is not None
    (train, test), _ = load_cifar10(repository() / dataset.archive, dataset.urls)
    return (
        Images(len(train), lambda start, stop: train[start:stop]),
        Images(len(test), lambda start, stop: test[start:stop]),
        {},
    )


def _load_shapes(dataset: Dataset) -> tuple[Images, Images, Facts]:
    seed, shape = dataset.seed, dataset.image_shape
    num_train = NUM_SHAPES if dataset.num_images is None else dataset.num_images
    assert seed is not None
    return (
        Images(num_train, lambda start, stop: draw_shapes(seed, start, stop - start, shape)),
        Images(NUM_TEST_SHAPES, lambda start, stop: draw_shapes(seed, _TEST_SHAPES_START + start, stop - start, shape)),
        {},
    )


def _load_folder(dataset: Dataset) -> tuple[Images, Images, Facts]:
    folder, skip = pictures_folder(dataset), dataset.skip_unusable is True
    workspace = dataset.folder.parent
    workspace.mkdir(parents=True, exist_ok=True)
    images, train, test, facts = load_pictures(
        folder, unusable_list(dataset), workspace, dataset.image_shape, skip_unusable=skip
    )
    return (
        Images(len(train), lambda start, stop: images[train[start:stop]]),
        Images(len(test), lambda start, stop: images[test[start:stop]]),
        {"pictures": facts},
    )


def pictures_folder(dataset: Dataset) -> Path:
    """Where the pictures of dataset=folder are."""
    assert dataset.pictures is not None
    return repository() / dataset.pictures


def unusable_list(dataset: Dataset) -> Path:
    """The file, beside the prepared data, that lists the pictures that cannot be used."""
    return dataset.folder.with_suffix(".unusable.txt")


_LOADERS = {"cifar10": _load_cifar10, "shapes": _load_shapes, "folder": _load_folder}


# ---- the folder


def _source(dataset: Dataset) -> str:
    channels, height, width = dataset.image_shape
    size = f"{height}x{width}{', grey' if channels == 1 else ''}"
    return SOURCES[dataset.name].format(cut="square" if height == width else "rectangle", size=size)


def _wanted(dataset: Dataset) -> dict[str, Any]:
    """The values that decide which images are in the folder."""
    keys = ("name", "num_images", "seed", *(("pictures",) if dataset.name == "folder" else ()))
    return {key: getattr(dataset, key) for key in keys}


def _is_valid(dataset: Dataset) -> bool:
    """Whether the folder holds what is wanted, every byte of it, made from the pictures as they are now."""
    folder = dataset.folder
    try:
        manifest = load_manifest(folder, "prepare it again")
        shapes = [entry["shape"][1:] for entry in manifest["files"].values()]
        if manifest["dataset"] != _wanted(dataset) or shapes != [list(dataset.image_shape)] * 2:
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


def _content(images: Images, shape: tuple[int, ...], desc: str) -> Iterator[bytes | memoryview]:
    """The parts of a .npy file, as `np.save` writes it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    yield header.getvalue()
    step = max(1, CHUNK_BYTES // math.prod(shape[1:]))
    for start in progress_bar(range(0, images.count, step), desc=desc):
        yield np.ascontiguousarray(images.take(start, min(start + step, images.count))).data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Writes a new file and returns its SHA-256."""
    digest = hashlib.sha256()
    with naming(path), path.open("xb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        fsync(file.fileno())
    return digest.hexdigest()


def _write_images(path: Path, images: Images) -> FileFacts:
    shape = images.count, *images.take(0, 1).shape[1:]
    sha256 = _write(path, _content(images, shape, desc=f"writing {path.name}"))
    facts: FileFacts = {"sha256": sha256, "count": images.count, "shape": list(shape), "dtype": "uint8"}
    if path.stat().st_size > LARGE_BYTES:
        facts["sampled_sha256"] = sampled_sha256_of(path)
    return facts


def _load(dataset: Dataset) -> tuple[Images, Images, Facts]:
    train, test, facts = _LOADERS[dataset.name](dataset)
    if dataset.num_images is None:
        return train, test, facts
    if dataset.num_images > train.count:
        raise UserError(
            f"dataset.num_images must be at most {train.count} for {dataset.name}, got {dataset.num_images}"
        )
    return train._replace(count=dataset.num_images), test, facts


def _replace_folder(dataset: Dataset, train: Images, test: Images, facts: Facts) -> None:
    """Replaces the folder by one with these images; if that fails, the old one stays. Only under the lock."""
    folder = dataset.folder
    new, old = (folder.with_name(f".{folder.name}.new{suffix}") for suffix in ("", ".old"))
    try:
        new.mkdir()
        files = {name: _write_images(new / name, images) for name, images in (("train.npy", train), ("test.npy", test))}
        manifest: Manifest = {"dataset": _wanted(dataset), "source": _source(dataset), **facts, "files": files}
        _write(new / "manifest.json", [(json.dumps(manifest, indent=2) + "\n").encode()])
        sync(new)
        with uninterrupted():
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
        loaded = None if _is_valid(dataset) else _load(dataset)
        if loaded or _leftovers(folder):
            with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
                for leftover in _leftovers(folder):
                    shutil.rmtree(leftover)
                if loaded:
                    _replace_folder(dataset, *loaded)
    except OSError as error:
        place = error.filename or folder
        raise UserError(
            f"{place}: {error.strerror or error}: free some space or change its permissions, "
            "or set dataset.root (prepared data) or dataset.archive (the archive) to another place"
        ) from error
    return load_manifest(folder, "run prepare_data.py again"), loaded is not None
