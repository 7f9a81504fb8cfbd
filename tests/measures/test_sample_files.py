"""Samples as files: what is written is read again, and other files are rejected by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.measures.sample_files import read_samples, write_samples
from modeling.system.errors import UserError
from tests.helpers import random_images

IMAGES, IDENTITY = random_images(11, 3, 4, 4), {"seed": 1, "sampler": "ddim"}


def test_an_npz_holds_images_and_identity_in_the_usual_layout(tmp_path):
    write_samples(IMAGES, IDENTITY, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (11, 4, 4, 3)
    found, identity = read_samples(tmp_path / "samples.npz")
    assert torch.equal(found, IMAGES)
    assert identity == IDENTITY


def test_a_folder_holds_a_png_for_each_image_and_the_identity(tmp_path):
    write_samples(IMAGES, IDENTITY, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == [f"{number:02d}.png" for number in range(11)]
    read = np.stack([np.asarray(Image.open(tmp_path / "out" / name)) for name in names])
    assert np.array_equal(read, IMAGES.permute(0, 2, 3, 1).numpy())
    assert json.loads((tmp_path / "out" / "identity.json").read_text()) == IDENTITY
    write_samples(IMAGES[:2], IDENTITY, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2  # nothing is left of the larger set


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": np.zeros((2, 4, 4, 3))},
        {"arr_0": np.zeros((2, 3, 4, 4), np.uint8)},
        {"arr_0": np.zeros(3, np.uint8)},
        {"arr_0": np.array([{}])},
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "identity": "[1]"},
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "identity": "{"},
        {"images": np.zeros((2, 4, 4, 3), np.uint8)},
        {},
    ],
)
def test_other_arrays_are_no_samples(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=r"x\.npz is no \.npz with an array arr_0, or damaged: "):
        read_samples(tmp_path / "x.npz")


def test_a_single_array_under_that_name_is_no_samples(tmp_path):
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match=r"x\.npz is no"):
        read_samples(tmp_path / "x.npz")
