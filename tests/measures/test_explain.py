"""Pictures that explain a model: the path of an image, and images between two."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from modeling.diffusion import DiffusionModel
from modeling.images import enlarge, make_grid, to_uint8
from modeling.measures.explain import (
    Moment,
    denoising_path,
    draw_moment,
    draw_path,
    encode_animation,
    interpolation,
)
from modeling.samplers import Sampler, sample_images
from tests.helpers import Lambda, random_images

pytestmark = pytest.mark.numeric

SIZE = (3, 4, 4)


def model() -> DiffusionModel:
    return DiffusionModel(Lambda(lambda x, t: torch.tanh(0.7 * x) * t[:, None, None, None]), (0.01, 0.3), 12)


def test_the_path_of_an_image_begins_in_noise_and_ends_in_its_sample():
    sampler = Sampler(num_steps=9)
    moments = denoising_path(model(), 2, SIZE, "cpu", sampler, seed=1, num_moments=4)
    steps = {}

    def observe(timestep, x_t, x_0):
        steps[timestep] = to_uint8(x_t), to_uint8(x_0)

    expected = to_uint8(sample_images(model(), 2, SIZE, "cpu", sampler, seed=1, observe=observe))
    assert [moment.timestep for moment in moments] == [12, 8, 4, 0]
    for timestep, x_t, x_0 in moments[:-1]:
        assert torch.equal(x_t, steps[timestep][0])
        assert torch.equal(x_0, steps[timestep][1])
    assert torch.equal(moments[-1].x_t, expected)
    assert torch.equal(moments[-1].x_0, expected)


def test_of_a_few_steps_each_is_a_moment_of_the_path():
    moments = denoising_path(model(), 1, SIZE, "cpu", Sampler(num_steps=3), seed=1)
    assert [moment.timestep for moment in moments] == [12, 8, 4, 0]


MOMENTS = [Moment(timestep, *random_images(4, 3, 32, 32, seed=timestep).split(2)) for timestep in (12, 6, 0)]


def test_the_path_is_drawn_in_rows_of_x_t_and_predicted_x_0():
    picture = draw_path(MOMENTS, scale=2)
    rows = [[getattr(moment, name)[image] for moment in MOMENTS] for image in range(2) for name in ("x_t", "x_0")]
    tiles = torch.cat([enlarge(make_grid(torch.stack(row), 3), 2) for row in rows], dim=1)
    assert torch.equal(picture[:, -tiles.shape[1] :, -tiles.shape[2] :], tiles)
    above = picture[:, : -tiles.shape[1], -tiles.shape[2] :].tensor_split(3, dim=2)
    beside = picture[:, -tiles.shape[1] :, : -tiles.shape[2]].tensor_split(4, dim=1)
    assert all(place.min() < 128 for place in above + beside)  # a timestep and a name


@pytest.mark.parametrize(("suffix", "tolerance"), [(".gif", 16), (".webp", 0)])
def test_an_animation_shows_each_moment_and_says_how_it_was_made(suffix, tolerance):
    frames, about = [draw_moment(moment) for moment in MOMENTS], {"seed": 1}
    with Image.open(io.BytesIO(encode_animation(frames, suffix, about))) as animation:
        found, durations = [], []
        for frame in ImageSequence.Iterator(animation):
            found.append(np.array(frame.convert("RGB")).astype(int))
            durations.append(frame.info["duration"])
        text = animation.info["comment"] if suffix == ".gif" else animation.getexif()[0x010E]
    assert json.loads(text) == about
    assert durations == [100, 100, 3000]
    for shown, frame in zip(found, frames, strict=True):
        assert np.abs(shown - frame.permute(1, 2, 0).numpy()).mean() <= tolerance


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
