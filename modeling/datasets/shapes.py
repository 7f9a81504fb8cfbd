"""The `shapes` data set, drawn by the project itself: one disc, square or triangle on a plain background.

A first look needs no download, and anyone can see at once whether a sample is right. Each kind has its own family of
colours, so a small network learns them in minutes; and a red square or a green disc is one more way to be wrong.
"""

import colorsys

import numpy as np

from modeling import IMAGE_SHAPE

_SUPERSAMPLING = 4  # sub-pixels a side: 17 levels at an edge
_KINDS = (  # sides, range of hues, area / inradius^2, outer radius / inradius
    (0, (0.00, 0.15), np.pi, 1.0),  # discs: red to yellow
    (3, (0.28, 0.42), 3 * np.sqrt(3), 2.0),  # triangles: green
    (4, (0.55, 0.72), 4.0, np.sqrt(2)),  # squares: blue
)


def _polygon_distance(x: np.ndarray, y: np.ndarray, num_sides: int, inradius: float) -> np.ndarray:
    """Signed distance to the sides of a regular polygon around the origin, which rests on one side; negative inside."""
    normals = np.pi / 2 + 2 * np.pi * np.arange(num_sides) / num_sides  # y grows downwards
    return np.max([x * np.cos(normal) + y * np.sin(normal) - inradius for normal in normals], axis=0)


_GREY = np.array([0.299, 0.587, 0.114])  # of red, green, blue, as Pillow weighs them


def draw_shape(rng: np.random.Generator, image_shape: tuple[int, int, int] = IMAGE_SHAPE) -> np.ndarray:
    """One image: (C, H, W) uint8, anti-aliased; kind, place, size and colours are drawn from rng."""
    channels, height, width = image_shape
    scale = min(height, width) / 32
    num_sides, hues, area_per_inradius_squared, outer_per_inradius = _KINDS[rng.integers(len(_KINDS))]
    inradius = scale * np.sqrt(rng.uniform(120, 200) / area_per_inradius_squared)  # equal areas, in pixels at 32x32
    middle = np.array([width, height]) / 2
    max_shift = np.minimum(middle * 5 / 16, middle - outer_per_inradius * inradius - scale)
    centre_x, centre_y = middle + rng.uniform(-max_shift, max_shift)
    background = np.array(colorsys.hsv_to_rgb(0, 0, rng.uniform(0.0, 1.0)))
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(*hues), 1.0, rng.uniform(0.75, 1.0)))

    rows, columns = ((np.arange(size * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING for size in (height, width))
    y, x = np.meshgrid(rows - centre_y, columns - centre_x, indexing="ij")
    distance = _polygon_distance(x, y, num_sides, inradius) if num_sides else np.hypot(x, y) - inradius
    inside = (distance < 0).reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING).mean(axis=(1, 3))
    if channels == 1:
        background, colour = (np.array([_GREY @ rgb]) for rgb in (background, colour))
    image = background[:, None, None] + (colour - background)[:, None, None] * inside
    return np.round(image * 255).astype(np.uint8)


def draw_shapes(seed: int, first: int, count: int, image_shape: tuple[int, int, int] = IMAGE_SHAPE) -> np.ndarray:
    """Images first..first+count-1 of the endless data set of this seed: (count, C, H, W) uint8."""
    indices = range(first, first + count)
    return np.stack([draw_shape(np.random.default_rng([seed, index]), image_shape) for index in indices])
