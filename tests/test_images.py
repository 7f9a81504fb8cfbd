"""Between [-1, 1] and 8 bits: exact, clamped, never stretched."""

import json
import os

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from modeling.images import enlarge, make_grid, save_grid, to_model_range, to_uint8
from modeling.system.files import write_atomically
from tests.helpers import random_images


def test_every_8_bit_value_survives_the_way_there_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(values)
    assert (scaled.min(), scaled.max(), scaled.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(scaled), values)


def test_values_are_clamped_and_rounded_to_the_nearest():
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([0.49, 0.51]) / 127.5 - 1).tolist() == [0, 1]


def test_a_grid_is_not_normalised_per_image():
    """A dull image must stay dull beside a bright one."""
    dull, bright = torch.full((1, 3, 4, 4), -0.2), torch.ones(1, 3, 4, 4)
    grid = make_grid(torch.cat([dull, bright]), num_columns=2)
    assert grid.dtype == torch.uint8
    assert grid[:, 3, 3].tolist() == [102, 102, 102]
    assert grid[:, 3, 9].tolist() == [255, 255, 255]


def test_columns_default_to_a_square():
    assert make_grid(torch.zeros(16, 3, 4, 4)).shape == (3, 4 * 6 + 2, 4 * 6 + 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "num_columns"), [(2, None), (5, None), (7, 3), (36, None), (3, 10)])
def test_a_grid_is_that_of_torchvision(channels, count, num_columns):
    """It takes 1.3 s to import, so a run does not use it."""
    images, nrow = random_images(count, channels, 6, 5), round(count**0.5) if num_columns is None else num_columns
    expected = torchvision.utils.make_grid(images, nrow=nrow, padding=2, pad_value=255)
    assert torch.equal(make_grid(images, num_columns), expected)


def test_a_grid_without_columns_is_rejected():
    with pytest.raises(ValueError, match="num_columns must be at least 1, got 0"):
        make_grid(torch.zeros(2, 3, 4, 4), num_columns=0)


def test_an_image_that_is_not_finite_is_magenta_in_a_grid():
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0, 2, 3], images[2, 1, 0, 0] = torch.nan, torch.inf
    colours = torch.tensor([[128, 128, 128], [255, 0, 255], [255, 0, 255]], dtype=torch.uint8)
    assert torch.equal(make_grid(images), make_grid(colours[:, :, None, None].expand(-1, -1, 4, 4)))


@pytest.mark.parametrize(
    ("width", "scale", "expected"), [(206, None, 618), (500, None, 500), (1, None, 500), (9, 2, 18)]
)
def test_a_picture_is_enlarged_until_it_is_500_pixels_wide(width, scale, expected):
    picture = random_images(1, 3, 5, width)[0]
    larger = enlarge(picture, scale)
    factor = expected // width
    assert larger.shape == (3, 5 * factor, expected)
    assert all(torch.equal(larger[:, y::factor, x::factor], picture) for y in range(factor) for x in range(factor))


def test_a_saved_grid_is_the_enlarged_one_and_says_how_it_was_made(tmp_path):
    images, about = torch.rand(4, 3, 4, 4) * 2 - 1, {"seed": 3, "sampler": "ddim"}
    picture = save_grid(images, tmp_path / "a" / "b.png", scale=3, about=about)
    assert torch.equal(picture, enlarge(make_grid(images), 3))
    with Image.open(tmp_path / "a" / "b.png") as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), picture)
        assert json.loads(image.info["Comment"]) == about


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
