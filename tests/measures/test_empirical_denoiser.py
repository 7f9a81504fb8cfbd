"""The optimal denoiser of the training images: exact, whatever the parts it reads them in."""

import pytest
import torch

from modeling.diffusion import DiffusionModel
from modeling.heldout import denoising_loss
from modeling.images import to_model_range
from modeling.measures import empirical_denoiser
from modeling.measures.empirical_denoiser import EmpiricalDenoiser
from modeling.schedules import linear_betas, schedule_tables
from tests.helpers import random_images

pytestmark = pytest.mark.numeric

BETAS, T = (1e-4, 0.02), 1000
ABAR = schedule_tables(linear_betas(BETAS[0], BETAS[1], T))["alphas_cumprod"]
# Near each other, so that a posterior is shared by several of them at most timesteps.
IMAGES = 120 + random_images(7, 3, 2, 2) // 32


@pytest.mark.parametrize("num_at_a_time", [1, 3, 100])
def test_eps_is_the_posterior_mean_written_out_in_float64(monkeypatch, num_at_a_time):
    monkeypatch.setattr(empirical_denoiser, "_PART_NUMBERS", 12 * num_at_a_time)
    net = EmpiricalDenoiser(IMAGES, ABAR)
    timesteps = torch.tensor([1, 2, 10, 100, 300, 600, 900, 1000])
    a = ABAR[timesteps][:, None]
    x_0 = to_model_range(IMAGES).double().flatten(1)
    x_t = (a.sqrt() * x_0[-1:] + (1 - a).sqrt() * torch.randn(8, 12)).float()
    squares = (x_t[:, None].double() - a[:, None].sqrt() * x_0).square().sum(2)  # ||x_t - sqrt(abar) x_i||^2, (8, 7)
    posterior = torch.softmax(-squares / (2 * (1 - a)), dim=1)
    expected = (x_t - a.sqrt() * (posterior @ x_0)) / (1 - a).sqrt()
    found = net(x_t.reshape(8, 3, 2, 2), timesteps / T)
    torch.testing.assert_close(found.flatten(1), expected.float(), rtol=1e-4, atol=1e-4)
    num_likely = (posterior > 0.05).sum(1)
    assert (num_likely[0], num_likely[-1]) == (1, 7)  # the test is of both ends


def test_one_training_image_is_known_exactly():
    one = random_images(1, 3, 8, 8)
    model = DiffusionModel(EmpiricalDenoiser(one, ABAR), BETAS, T)
    assert denoising_loss(model, one.expand(1000, -1, -1, -1), "cpu")[0] < 1e-9
