"""Editing: what is kept is kept, and on Gaussian data the rest has the distribution that is known in closed form."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.config import parse
from modeling.diffusion import DiffusionModel
from modeling.images import to_model_range, to_uint8
from modeling.measures.edit import draw_edited, inpaint, variations
from modeling.measures.linear_denoiser import LinearDenoiser
from modeling.measures.trained import TrainedModel
from modeling.options import SampleConfig
from modeling.samplers import SAMPLERS, Sampler, sample_images
from modeling.schedules import linear_betas, schedule_tables
from modeling.system.errors import UserError
from tests.helpers import Lambda, gaussian_oracle, random_images

pytestmark = pytest.mark.numeric

IMAGE = to_model_range(random_images(3, 4, 4))
MASK = torch.zeros(1, 4, 4, dtype=torch.bool)
MASK[:, 1:3, 2:] = True


def model() -> DiffusionModel:
    return DiffusionModel(Lambda(lambda x, t: torch.tanh(0.7 * x) * t[:, None, None, None]), (0.01, 0.3), 12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_kept_is_the_given_image_to_the_bit(name):
    images = inpaint(model(), IMAGE, MASK, 3, "cpu", Sampler(name, 6), seed=1, num_resamplings=3, jump_length=2)
    kept = ~MASK.expand(3, 3, 4, 4)
    assert torch.equal(images[kept], IMAGE.expand(3, 3, 4, 4)[kept])
    assert (images[~kept] - IMAGE.expand(3, 3, 4, 4)[~kept]).abs().min() > 0
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(pixels)), pixels)


def test_where_all_is_drawn_once_the_images_are_samples():
    everywhere, sampler = torch.ones(1, 4, 4, dtype=torch.bool), Sampler(num_steps=7)
    found = inpaint(model(), IMAGE, everywhere, 3, "cpu", sampler, seed=1, num_resamplings=1, jump_length=2)
    assert torch.equal(found, sample_images(model(), 3, (3, 4, 4), "cpu", sampler, seed=1))


@pytest.mark.parametrize("edit", [lambda *given, **seed: inpaint(given[0], IMAGE, MASK, *given[1:], **seed),
                                  lambda *given, **seed: variations(given[0], IMAGE, *given[1:], **seed)])  # fmt: skip
def test_an_edited_image_is_a_function_of_the_seed_and_its_number(edit):
    few, more, other = (
        edit(model(), count, "cpu", Sampler(num_steps=6), seed=seed) for count, seed in ((2, 1), (4, 1), (2, 2))
    )
    torch.testing.assert_close(few, more[:2])
    assert len({tuple(image.flatten().tolist()) for image in [*more, *other]}) == 6


def test_the_model_sees_what_is_kept_as_the_noised_image_at_each_visit():
    """In each later call x_t ~ N(sqrt(abar) x_0, 1 - abar), after a step upward as well: no draw is used twice."""
    seen = []

    def eps(x, t):
        seen.append((round(12 * t[0].item()), x[:, 0, 0, 0]))
        return torch.tanh(0.7 * x) * t[:, None, None, None]

    recording = DiffusionModel(Lambda(eps), (0.01, 0.3), 12)
    inpaint(recording, IMAGE, MASK, 4000, "cpu", Sampler(), seed=1, num_resamplings=3, jump_length=4)
    assert [timestep for timestep, _ in seen][:10] == [12, 11, 10, 9, 12, 11, 10, 9, 12, 11]
    for timestep, x in seen[1:]:
        abar = recording.schedules_float64["alphas_cumprod"][timestep].item()
        assert x.mean().item() == pytest.approx(abar**0.5 * IMAGE[0, 0, 0].item(), abs=0.07)
        assert x.var().item() == pytest.approx(1 - abar, rel=0.12)


def inpainting_errors(num_timesteps: int, num_images: int, num_resamplings: int, jump_length: int):
    """Four pixels, correlated by 0.8 with their neighbours, of which the middle two are drawn given the others.

    Returns:
        How far the mean is from that of the conditional distribution, in its standard deviations, and the ratios of
        their covariances, less 1: the largest of each.
    """
    betas = linear_betas(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps)
    mean, places = torch.tensor([0.1, 0.0, -0.1, 0.2]), torch.arange(4)
    covariance = 0.25 * 0.8 ** (places[:, None] - places).abs().double()
    denoiser = LinearDenoiser(mean, covariance, schedule_tables(betas)["alphas_cumprod"])
    image, is_drawn = torch.tensor([[[0.6, 0.0, 0.0, -0.4]]]), torch.tensor([[[False, True, True, False]]])
    found = inpaint(
        DiffusionModel(denoiser, betas, num_timesteps), image, is_drawn, num_images, "cpu", Sampler(clip_x0=False),
        seed=1, num_resamplings=num_resamplings, jump_length=jump_length,
    ).flatten(1)[:, 1:3].double()  # fmt: skip
    drawn, kept = [1, 2], [0, 3]
    regression = covariance[drawn][:, kept] @ torch.linalg.inv(covariance[kept][:, kept])
    expected = mean[drawn] + regression @ (image.flatten() - mean)[kept].double()
    conditional = covariance[drawn][:, drawn] - regression @ covariance[kept][:, drawn]
    mean_error = (found.mean(0) - expected) / conditional.diag().sqrt()
    return mean_error.abs().max().item(), (torch.cov(found.T) / conditional - 1).abs().max().item()


def test_resampling_brings_what_is_drawn_towards_its_distribution_given_the_rest():
    """RePaint is approximate: without resampling the covariance is nearly twice as large."""
    once, often = (inpainting_errors(100, 2000, num_resamplings, 5) for num_resamplings in (1, 5))
    assert once[0] > 0.2
    assert once[1] > 0.6
    assert often[0] < 0.15
    assert often[1] < 0.25


@pytest.mark.long
def test_with_1000_steps_and_10_resamplings_the_distribution_is_the_conditional_one():
    mean_error, covariance_error = inpainting_errors(1000, 4000, 10, 10)
    assert mean_error < 0.07
    assert covariance_error < 0.08


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_weakest_variation_is_the_image_and_the_strongest_a_sample(name):
    weakest, weak, strongest = (
        variations(model(), IMAGE, 2, "cpu", Sampler(name, 6), seed=1, strength=strength)
        for strength in (0.01, 2 / 12, 1.0)
    )
    assert torch.equal(weakest, IMAGE.expand(2, 3, 4, 4))
    assert not torch.equal(weak, weakest)  # it begins at timestep 2
    assert torch.equal(strongest, sample_images(model(), 2, (3, 4, 4), "cpu", Sampler(name, 6), seed=1))


@pytest.mark.parametrize("strength", [0.2, 0.5])
@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_variations_of_gaussian_data_have_the_distribution_in_closed_form(name, strength):
    """x_t ~ N(sqrt(abar) x_0, 1 - abar); then the posterior of x_0, or the flow that keeps each quantile."""
    std, x_0, num_timesteps = 0.5, 0.8, 400
    model = gaussian_oracle(std, (2.5e-4, 0.05), num_timesteps)
    abar = model.schedules_float64["alphas_cumprod"][int(strength * num_timesteps)].item()
    total = abar * std**2 + 1 - abar  # variance of x_t over all data
    slope = {"ancestral": abar**0.5 * std**2 / total, "ddim": std / total**0.5}[name]
    variance = slope**2 * (1 - abar) + {"ancestral": std**2 * (1 - abar) / total, "ddim": 0.0}[name]
    found = variations(
        model, torch.tensor([[[x_0]]]), 10_000, "cpu", Sampler(name, clip_x0=False), seed=1, strength=strength
    )
    assert found.mean().item() == pytest.approx(slope * abar**0.5 * x_0, abs=0.02)
    assert found.var().item() == pytest.approx(variance, rel=0.05)


def test_an_edited_image_that_is_not_finite_is_an_error():
    broken = DiffusionModel(Lambda(lambda x, t: x * float("nan")), (0.01, 0.3), 12)
    for edit in (lambda *given, seed: inpaint(broken, IMAGE, MASK, *given, seed=seed),
                 lambda *given, seed: variations(broken, IMAGE, *given, seed=seed)):  # fmt: skip
        with pytest.raises(FloatingPointError, match="an image is not finite"):
            edit(1, "cpu", Sampler(num_steps=4), seed=1)


# ---- given files


def stored(tmp_path, name: str, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(tmp_path / name)
    return str(tmp_path / name)


def trained_model(compose_config, *overrides: str) -> tuple[TrainedModel, SampleConfig]:
    values = ["checkpoint=any.pt", "device=cpu", "num_steps=4", *overrides]
    options = parse(compose_config(*values, name="sample"), SampleConfig)
    return TrainedModel(options, model(), {}, (3, 4, 4)), options


def test_picture_and_mask_are_cut_and_reduced_alike(tmp_path, compose_config):
    """48x96 pixels to 4x4: the centre is 48 wide, and a pixel of the result is 12 of theirs."""
    picture, mask = np.full((48, 96, 3), 200, np.uint8), np.zeros((48, 96), np.uint8)
    picture[:, 24:48] = mask[12:24, 24:36] = 255
    files = f"image={stored(tmp_path, 'a.png', picture)}", f"mask={stored(tmp_path, 'm.png', mask)}"
    given, hole, *results = draw_edited(*trained_model(compose_config, "picture=inpaint", *files), 2)
    assert (given[:, :, [0, 3]].int() - torch.tensor([255, 200])).abs().max() <= 1
    is_drawn = torch.zeros(3, 4, 4, dtype=torch.bool)
    is_drawn[:, 1, 0] = True
    assert torch.equal(hole, given.masked_fill(is_drawn, 128))
    assert len(results) == 2
    assert all(torch.equal(result[~is_drawn], given[~is_drawn]) for result in results)


def test_given_files_that_do_not_fit_are_rejected_by_their_key(tmp_path, compose_config):
    black, white = (np.full((8, 9), value, np.uint8) for value in (0, 255))
    image, text = stored(tmp_path, "a.png", black), tmp_path / "text.png"
    text.write_text("no picture")
    all_white = stored(tmp_path, "white.png", white)
    for picture, mask, message in (
        (str(text), image, f"image={text}: not a picture in AVIF, "),
        (image, str(text), f"mask={text}: not a picture in AVIF, "),
        (stored(tmp_path, "small.png", black[:3]), image, f"image={tmp_path}/small.png: 9x3 pixels, at least 4x4"),
        (image, stored(tmp_path, "low.png", white[:7]), f"mask={tmp_path}/low.png: 9x7 pixels, expected the size of "),
        (image, image, f"mask={image}: is black everywhere, expected white where the picture is to be drawn"),
        (image, all_white, f"mask={all_white}: is white everywhere (transparent is white), expected white where"),
    ):
        given = trained_model(compose_config, "picture=inpaint", f"image={picture}", f"mask={mask}")
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            draw_edited(*given, 1)
    given = trained_model(compose_config, "picture=variations", f"image={tmp_path}/nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        draw_edited(*given, 1)
