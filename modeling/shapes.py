"""The `shapes` data set, drawn by the project itself: one disc, square or triangle on a plain background.

A first look needs no download, and everyone sees at once whether a sample is right.
"""

import colorsys

import numpy as np

IMAGE_SIZE = 32
_SUPERSAMPLING = 4  # sub-pixels a side: 17 grey levels at an edge


def _polygon_distance(x: np.ndarray, y: np.ndarray, num_sides: int, inradius: float) -> np.ndarray:
    """Signed distance to the sides of a regular polygon at the origin that lies on one side; negative inside."""
    normals = np.pi / 2 + 2 * np.pi * np.arange(num_sides) / num_sides  # y grows downwards
    return np.max([x * np.cos(normal) + y * np.sin(normal) - inradius for normal in normals], axis=0)


def draw_shape(rng: np.random.Generator) -> np.ndarray:
    """One image: (3, 32, 32) uint8, anti-aliased, kind, place, size and colours drawn from rng."""
    kind = rng.integers(3)
    area = rng.uniform(110, 200)  # pixels
    background = np.array(colorsys.hsv_to_rgb(0, 0, rng.uniform(0.0, 1.0)))
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), 1.0, rng.uniform(0.75, 1.0)))
    disc_radius = np.sqrt(area / np.pi)
    square_inradius = np.sqrt(area) / 2
    triangle_inradius = np.sqrt(area / (3 * np.sqrt(3)))
    outer_radius = (disc_radius, square_inradius * np.sqrt(2), triangle_inradius * 2)[kind]
    centre_x, centre_y = rng.uniform(outer_radius + 1, IMAGE_SIZE - outer_radius - 1, size=2)

    positions = (np.arange(IMAGE_SIZE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    y, x = np.meshgrid(positions - centre_y, positions - centre_x, indexing="ij")
    if kind == 0:
        distance = np.hypot(x, y) - disc_radius
    elif kind == 1:
        distance = _polygon_distance(x, y, 4, square_inradius)
    else:
        distance = _polygon_distance(x, y, 3, triangle_inradius)
    inside = (distance < 0).reshape(IMAGE_SIZE, _SUPERSAMPLING, IMAGE_SIZE, _SUPERSAMPLING).mean(axis=(1, 3))
    image = background[:, None, None] + (colour - background)[:, None, None] * inside
    return np.round(image * 255).astype(np.uint8)


def draw_shapes(seed: int, first: int, count: int) -> np.ndarray:
    """Images first..first+count-1 of the endless data set of this seed: (count, 3, 32, 32) uint8."""
    return np.stack([draw_shape(np.random.default_rng([seed, index])) for index in range(first, first + count)])
