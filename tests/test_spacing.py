"""The timesteps that a sampler visits, spaced in four ways; that they differ and descend is in test_properties.py."""

import numpy as np
import pytest
import torch

from modeling.samplers import SAMPLERS, Sampler, sample
from modeling.schedules import SPACINGS, linear_betas, respaced_timesteps, schedule_tables
from tests.helpers import zero_model

pytestmark = pytest.mark.numeric

ABARS = schedule_tables(linear_betas(1e-4, 0.02, 1000))["alphas_cumprod"]


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("trailing", [1000, 750, 500, 250]),
        ("linspace", [1000, 667, 334, 1]),
        ("quadratic", [1000, 562, 250, 62]),
        ("log_snr", [1000, 604, 74, 1]),
    ],
)
def test_timesteps_are_spaced_as_their_name_says(spacing, expected):
    assert respaced_timesteps(ABARS, 4, spacing) == expected
    assert respaced_timesteps(ABARS, 1, spacing) == [1000]
    assert respaced_timesteps(ABARS, 1000, spacing) == list(range(1000, 0, -1))


def test_steps_of_log_snr_are_equal():
    levels = torch.logit(ABARS[respaced_timesteps(ABARS, 8, "log_snr")]).diff().numpy()
    np.testing.assert_allclose(levels[:-1], levels.mean(), rtol=0.03)
    assert levels[-1] == pytest.approx(levels.mean(), rel=0.15)  # between timesteps 1 and 10 few are to choose from


def test_timesteps_that_round_to_the_same_move_apart():
    assert respaced_timesteps(ABARS[:11], 8, "quadratic") == [10, 8, 6, 5, 4, 3, 2, 1]  # 10 (i / 8)^2 is below 1 twice


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_visits_the_timesteps_of_its_spacing(name, spacing):
    seen = []
    sample(
        zero_model(), 1, (3,), "cpu", Sampler(name, 5, spacing=spacing),
        observe=lambda timestep, x_t, x_0: seen.append(timestep),
    )  # fmt: skip
    assert seen == respaced_timesteps(ABARS, 5, spacing)


def test_another_spacing_is_rejected():
    with pytest.raises(ValueError, match="spacing must be one of .*, got 'even'"):
        respaced_timesteps(ABARS, 5, "even")


def test_more_steps_than_timesteps_are_rejected():
    with pytest.raises(ValueError, match=r"1\.\.1000, got 1001"):
        sample(zero_model(), 1, (3,), "cpu", Sampler(num_steps=1001))
