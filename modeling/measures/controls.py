"""Images at growing distances from the training images: features are useful if distances in them grow, too."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from modeling.measures.distances import frechet_distance
from modeling.measures.extractors import Extractor
from modeling.measures.features import extract_features
from modeling.seeding import Purpose, draw_bits, draw_normal
from modeling.system.errors import UserError

_NOISE_STD, _BLUR_PIXELS = 15.0, 1.0
_NOISE_IMAGES = 1000  # at a time


def _round(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


def control_images(train: Tensor, test: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The training images, and control sets in order of increasing distance from them.

    Args:
        train, test: (N, 3, H, W) uint8; n is half of the training images or all test images, whichever are fewer.

    Returns:
        The first n training images; and, n of each kind: the second n training images ("train halves"), test images
        ("train / test"), the second n with normal noise of standard deviation 15 of 255 ("noise"), blurred with a
        Gaussian of 1 pixel ("blur"), normal noise with the mean and standard deviation of each pixel ("Gaussian"),
        and uniform noise ("uniform").
    """
    from torchvision.transforms.functional import gaussian_blur

    count = min(len(train) // 2, len(test))
    first, second, shape = train[:count], train[count : 2 * count], train.shape[1:]
    noise = torch.empty(second.shape)
    uniform = torch.empty_like(second)
    for start in range(0, count, _NOISE_IMAGES):  # the words take 8 times the memory of the images
        rows = slice(start, start + _NOISE_IMAGES)
        index = torch.arange(start, min(start + _NOISE_IMAGES, count))
        noise[rows] = draw_normal(0, Purpose.EVALUATION, 1, index, shape)
        words = draw_bits(0, Purpose.EVALUATION, 2, index, -(-math.prod(shape) // 8))  # 8 bytes each
        uniform[rows] = words.view(torch.uint8)[:, : math.prod(shape)].unflatten(1, shape)
    pixels = first.flatten(1).double()
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(pixels.T, correction=0))
    drawn = pixels.mean(0) + noise.flatten(1).double() * eigenvalues.clamp(min=0).sqrt() @ eigenvectors.T
    return first, {
        "train halves": second,
        "train / test": test[:count],
        "noise": _round(second + _NOISE_STD * noise),
        "blur": gaussian_blur(second, kernel_size=[2 * math.ceil(3 * _BLUR_PIXELS) + 1] * 2, sigma=[_BLUR_PIXELS] * 2),
        "Gaussian": _round(drawn).unflatten(1, shape),
        "uniform": uniform,
    }


def control_distances(extractor: Extractor, train: Tensor, test: Tensor) -> dict[str, float]:
    """Frechet distances of the control sets from the training images, in the order of `control_images`.

    All sets have the same number of images, on which the distance depends.
    """
    reference, controls = control_images(train, test)
    reference = extract_features(extractor, reference, desc="reference").values
    features = {name: extract_features(extractor, images, desc=name).values for name, images in controls.items()}
    return {name: frechet_distance(values, reference) for name, values in features.items()}


def check_rising(distances: dict[str, float]) -> None:
    """Raises UserError unless each distance of `control_distances` is larger than the one before."""
    if not all(first < second for first, second in pairwise(distances.values())):
        raise UserError("the distances do not rise from row to row: these features do not measure what they should")
