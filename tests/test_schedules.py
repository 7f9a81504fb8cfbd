"""The noise schedules against their formulas; what holds for every schedule."""

import numpy as np
import pytest
import torch

from modeling.diffusion import get_schedules
from modeling.schedules import cosine_betas, linear_betas, schedule_tables
from tests.helpers import BETAS, T, numpy_tables, zero_model


def test_schedules_are_the_papers_in_float64():
    schedules = get_schedules(*BETAS, T)
    beta, alpha, abar = numpy_tables(BETAS, T)
    with np.errstate(invalid="ignore"):
        ratio = np.nan_to_num((1 - alpha) / np.sqrt(1 - abar))
    expected = {
        "betas": beta,
        "alphas": alpha,
        "alphas_cumprod": abar,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alpha_prod": np.sqrt(1 - abar),
        "inv_sqrt_alphas": 1 / np.sqrt(alpha),
        "sqrt_betas": np.sqrt(beta),
        "one_minus_alpha_over_prod": ratio,
    }
    assert schedules.keys() == expected.keys()
    for name, table in schedules.items():
        assert table.dtype == torch.float32
        assert table.shape == (T + 1,)
        np.testing.assert_allclose(table.double().numpy(), expected[name], rtol=1e-7, err_msg=name)


def test_known_constants_of_the_papers_schedule():
    model = zero_model()
    assert model.get_buffer("alphas_cumprod")[1000].item() == pytest.approx(4.03583e-5, rel=1e-5)
    assert model.posterior_variance(2) == pytest.approx(5.45319e-5, rel=1e-5)
    assert model.posterior_variance(1) == 0


def test_the_ends_of_the_schedule_are_exact():
    schedules = get_schedules(0.003, 0.2, 7)
    assert schedules["betas"][[0, 1, 7]].tolist() == torch.tensor([0.0, 0.003, 0.2]).tolist()
    assert schedules["alphas_cumprod"][0] == 1
    assert schedules["one_minus_alpha_over_prod"][0] == 0


def test_a_single_timestep_has_beta1():
    assert get_schedules(0.1, 0.2, 1)["betas"].tolist() == torch.tensor([0.0, 0.1]).tolist()


@pytest.mark.parametrize(
    ("betas", "num_timesteps", "message"),
    [
        ((0.02, 1e-4), 10, "beta1=0.02, beta2=0.0001"),
        ((0.01, 0.01), 10, "0 < beta1 < beta2 < 1"),
        ((0.0, 0.02), 10, "beta1=0.0"),
        ((-0.1, 0.02), 10, "beta1=-0.1"),
        ((0.01, 1.0), 10, "beta2=1.0"),
        ((float("nan"), 0.02), 10, "beta1=nan"),
        (BETAS, 0, "num_timesteps must be at least 1, got 0"),
    ],
)
def test_wrong_schedules_are_rejected(betas, num_timesteps, message):
    with pytest.raises(ValueError, match=message):
        get_schedules(*betas, num_timesteps=num_timesteps)
    with pytest.raises(ValueError, match=message):
        zero_model(betas, num_timesteps)


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
