"""Pictures for the tests: noise of any size, stored in any format."""

from pathlib import Path

import numpy as np
from PIL import Image

from modeling.sections import Dataset
from tests.helpers import dataset


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored(image: np.ndarray | Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def fill(folder: Path, count: int, first: int = 0) -> Path:
    """Pictures 0.png, 1.png ... of 32x32 pixels, all different."""
    for number in range(first, first + count):
        stored(noise(32, 32, number), folder / f"{number}.png")
    return folder


def as_set(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def drawings(root: Path, num_images: int | None = None, *, skip_unusable: bool = False) -> Dataset:
    """The data set of the pictures in root/in, prepared in root/folder."""
    return dataset("folder", root, pictures=str(root / "in"), num_images=num_images, skip_unusable=skip_unusable)
