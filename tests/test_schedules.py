"""The cosine schedule against its formula; what holds for every schedule."""

import numpy as np
import pytest
import torch

from modeling.schedules import cosine_betas, linear_betas, schedule_tables

T = 1000


def test_alphas_cumprod_of_the_cosine_schedule_is_a_squared_cosine():
    """Nichol & Dhariwal 2021, eq. 17, up to where beta is cut to 0.999: at the very end."""
    tables = schedule_tables(cosine_betas(T))
    t = np.arange(T + 1) / T
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(tables["alphas_cumprod"].numpy()[:T], (f / f[0])[:T], rtol=1e-9)
    assert tables["betas"][T] == 0.999
    assert (tables["betas"][1:T] < 0.999).all()


@pytest.mark.parametrize("betas", [linear_betas(1e-4, 0.02, T), cosine_betas(T), cosine_betas(10)])
def test_the_signal_to_noise_ratio_falls_strictly(betas):
    abar = schedule_tables(betas)["alphas_cumprod"]
    snr = abar / (1 - abar)
    assert (snr[1:] < snr[:-1]).all()
    assert abar[-1] > 0


def test_the_cosine_schedule_keeps_more_of_the_image_in_the_middle():
    linear, cosine = (
        schedule_tables(betas)["alphas_cumprod"] for betas in (linear_betas(1e-4, 0.02, T), cosine_betas(T))
    )
    assert linear[T // 2] == pytest.approx(0.0785, abs=5e-4)
    assert cosine[T // 2] == pytest.approx(0.4938, abs=5e-4)


@pytest.mark.parametrize("make", [lambda: cosine_betas(0), lambda: linear_betas(0.1, 0.2, -1)])
def test_a_process_needs_a_timestep(make):
    with pytest.raises(ValueError, match="num_timesteps must be at least 1"):
        make()


def test_one_timestep_is_enough():
    assert cosine_betas(1).tolist() == [0.999]
    assert schedule_tables(torch.tensor([0.5]))["alphas_cumprod"].tolist() == [1.0, 0.5]
