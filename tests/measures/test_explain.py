"""Pictures that explain a model: the path of an image, and images between two."""

import pytest
import torch

from modeling.diffusion import DiffusionModel
from modeling.images import to_uint8
from modeling.measures.explain import denoising_path, interpolation
from modeling.samplers import Sampler, sample_images
from tests.helpers import Lambda

pytestmark = pytest.mark.numeric

SIZE = (3, 4, 4)


def model() -> DiffusionModel:
    return DiffusionModel(Lambda(lambda x, t: torch.tanh(0.7 * x) * t[:, None, None, None]), (0.01, 0.3), 12)


def test_the_path_of_an_image_begins_in_noise_and_ends_in_its_sample():
    sampler = Sampler(num_steps=9)
    found = denoising_path(model(), 2, SIZE, "cpu", sampler, seed=1, num_columns=4).reshape(2, 2, 4, *SIZE)
    steps = {}

    def observe(timestep, x_t, x_0):
        steps[timestep] = to_uint8(x_t), to_uint8(x_0)

    expected = to_uint8(sample_images(model(), 2, SIZE, "cpu", sampler, seed=1, observe=observe))
    assert torch.equal(found[:, 0, -1], expected)
    assert torch.equal(found[:, 1, -1], expected)
    assert torch.equal(found[:, 0, 0], steps[12][0])
    assert torch.equal(found[:, 1, 0], steps[12][1])


@pytest.mark.parametrize("show", [denoising_path, interpolation])
def test_a_picture_of_what_is_not_finite_is_an_error(show):
    broken = DiffusionModel(Lambda(lambda x, t: x * float("nan")), (0.01, 0.3), 12)
    with pytest.raises(FloatingPointError, match="a sample is not finite"):
        show(broken, 1, SIZE, "cpu", Sampler(num_steps=4), seed=1)


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_an_interpolation_goes_from_one_image_to_the_other(name):
    sampler = Sampler(name, num_steps=6)
    rows = interpolation(model(), 2, SIZE, "cpu", sampler, seed=1, num_columns=5).reshape(2, 5, *SIZE).int()
    images = to_uint8(sample_images(model(), 4, SIZE, "cpu", sampler, seed=1)).int()
    assert (rows[:, 0] - images[[0, 2]]).abs().max() <= 1
    assert (rows[:, -1] - images[[1, 3]]).abs().max() <= 1
    changes = (rows[:, 1:] - rows[:, :-1]).float().abs().mean((2, 3, 4))
    assert changes.max() < 3 * changes.min()
