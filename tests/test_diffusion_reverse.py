"""The reverse process: the posterior, Algorithm 2 step by step, and samples of data with a known answer."""

import numpy as np
import pytest
import torch
from torch import nn

from modeling.diffusion import DiffusionModel, evaluating
from tests.helpers import BETAS, Lambda, T, gaussian_oracle, numpy_tables, zero_model

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("timestep", [2, 3, 500, 1000])
def test_the_posterior_is_bayes_rule(timestep):
    """q(x_{t-1} | x_t, x_0) is the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0): precisions add up."""
    beta, alpha, abar = numpy_tables(BETAS, T)
    precision = alpha[timestep] / beta[timestep] + 1 / (1 - abar[timestep - 1])
    model, x_t, x_0 = zero_model(), 0.3, -0.8
    mean = alpha[timestep] ** 0.5 * x_t / beta[timestep] + abar[timestep - 1] ** 0.5 * x_0 / (1 - abar[timestep - 1])
    assert model.posterior_variance(timestep) == pytest.approx(1 / precision, rel=1e-9)
    found = model.posterior_mean(torch.tensor(x_t).double(), torch.tensor(x_0).double(), timestep)
    assert found.item() == pytest.approx(mean / precision, rel=1e-7)


def test_both_forms_of_the_mean_agree_without_clipping():
    """Eq. 11 is the posterior mean (eq. 7) at the x_0 that eps implies (eq. 15)."""
    model = DiffusionModel(Lambda(lambda x, t: torch.tanh(x)), BETAS, T)
    x_t = torch.randn(4, 6, dtype=torch.float64) * 0.1
    for timestep in (1, 2, 400, 1000):
        _, x_0 = model.predict(x_t, timestep)
        torch.testing.assert_close(model.p_mean(x_t, timestep), model.posterior_mean(x_t, x_0, timestep))


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("clip_x0", [False, True])
def test_every_step_of_sample_is_algorithm_2_written_out(variance, clip_x0):
    betas, steps = (0.01, 0.3), 12
    beta, alpha, abar = numpy_tables(betas, steps)
    noises = np.random.default_rng(0).normal(size=(steps + 1, 5, 2, 3))

    def eps_numpy(x, t):
        return np.tanh(0.7 * x + 0.2) * t

    model = DiffusionModel(Lambda(lambda x, t: torch.tanh(0.7 * x + 0.2) * t[:, None, None]), betas, steps)
    trajectory = []
    x = noises[0]
    for t in range(steps, 0, -1):
        eps = eps_numpy(x, t / steps)
        if clip_x0:
            x_0 = np.clip((x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t]), -1, 1)
            mean = (np.sqrt(abar[t - 1]) * beta[t] * x_0 + np.sqrt(alpha[t]) * (1 - abar[t - 1]) * x) / (1 - abar[t])
        else:
            mean = (x - beta[t] / np.sqrt(1 - abar[t]) * eps) / np.sqrt(alpha[t])
        sigma2 = beta[t] if variance == "large" else (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
        x = mean + np.sqrt(sigma2) * noises[t] if t > 1 else mean
        trajectory.append(x)

    asked = []

    def noise(timestep):
        asked.append(timestep)
        return torch.from_numpy(noises[timestep]).float()

    sampled = model.sample(5, (2, 3), "cpu", variance=variance, clip_x0=clip_x0, noise=noise)
    assert asked == [0, *range(steps, 1, -1)]
    np.testing.assert_allclose(sampled.numpy(), trajectory[-1], atol=2e-5)


def chain_variance(data_std: float, variance: str, betas, num_timesteps) -> float:
    """Variance of Algorithm 2's result for data N(0, s^2) and the best eps, from the recursion of the chain.

    With eps = k_t x_t every step is x_{t-1} = m_t x_t + sigma_t z with m_t = (1 - beta_t k_t / sqrt(1 - abar_t)) /
    sqrt(alpha_t), so Var x_{t-1} = m_t^2 Var x_t + sigma_t^2, from Var x_T = 1, and without noise in the last step.
    """
    beta, alpha, abar = numpy_tables(betas, num_timesteps)
    result = 1.0
    for t in range(num_timesteps, 0, -1):
        k = np.sqrt(1 - abar[t]) / (abar[t] * data_std**2 + 1 - abar[t])
        m = (1 - beta[t] / np.sqrt(1 - abar[t]) * k) / np.sqrt(alpha[t])
        sigma2 = beta[t] if variance == "large" else (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
        result = m**2 * result + (sigma2 if t > 1 else 0)
    return result


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("data_std", [0.2, 1.0])
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_gaussian_data_comes_back_with_the_exact_variance_of_the_chain(variance, data_std, num_timesteps):
    """The chain is linear, so its response to each noise alone gives mean and variance exactly, with no sampling."""
    betas = (1e-4 * 1000 / num_timesteps, 0.02 * 1000 / num_timesteps) if num_timesteps == 1000 else (0.01, 0.5)
    model = gaussian_oracle(data_std, betas, num_timesteps)
    unit = torch.eye(num_timesteps + 1, dtype=torch.float64)  # row i: image i has noise 1 at timestep i, else 0
    response = model.sample(num_timesteps + 1, (1,), "cpu", variance=variance, noise=lambda t: unit[:, t : t + 1])
    expected = chain_variance(data_std, variance, betas, num_timesteps)
    assert response.square().sum().item() == pytest.approx(expected, rel=1e-6)
    silent = model.sample(1, (1,), "cpu", variance=variance, noise=lambda t: torch.zeros(1, 1))
    assert silent.item() == 0  # mean 0


@pytest.mark.parametrize("variance", ["large", "small"])
def test_sampled_gaussians_have_that_mean_and_variance(variance):
    model, count = gaussian_oracle(0.5, (0.01, 0.5), 20), 200_000
    x = model.sample(count, (1,), "cpu", variance=variance).double()
    expected = chain_variance(0.5, variance, (0.01, 0.5), 20)
    assert x.mean().item() == pytest.approx(0, abs=5 * (expected / count) ** 0.5)
    assert x.var().item() == pytest.approx(expected, rel=5 * (2 / count) ** 0.5)


def test_each_variance_is_exact_for_its_own_data():
    """Section 3.2: beta_t is right for x_0 ~ N(0, 1), the posterior variance for a single x_0."""
    assert chain_variance(1.0, "large", BETAS, T) == pytest.approx(1 - BETAS[0], rel=1e-9)
    assert chain_variance(1e-9, "small", BETAS, T) == pytest.approx(0, abs=1e-12)
    point = gaussian_oracle(0.0)
    assert point.sample(3, (2,), "cpu", variance="small").abs().max() < 1e-5


def test_sampling_is_repeatable_by_seed_and_differs_between_seeds():
    model, draw = gaussian_oracle(0.5, (0.1, 0.5), 5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draw.append(model.sample(3, (2,), "cpu"))
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_clipping_keeps_the_last_image_in_range():
    wild = DiffusionModel(Lambda(lambda x, t: -5 * x), BETAS, 10)
    assert wild.sample(4, (8,), "cpu", clip_x0=True).abs().max() <= 1
    assert wild.sample(4, (8,), "cpu").abs().max() > 1


def test_sampling_keeps_no_gradient_restores_modes_and_shows_a_bar():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    model = DiffusionModel(Lambda(lambda x, t: net(x)), (0.1, 0.2), 3)
    model.eps_model.net = net
    net[0].eval()
    shown = []
    samples = model.sample(4, (2,), "cpu", bar=lambda steps: shown.extend(steps) or steps)
    assert shown == [3, 2, 1]
    assert not samples.requires_grad
    assert (model.training, net.training, net[0].training, net[1].training) == (True, True, False, True)


def test_dropout_is_off_while_sampling():
    model = DiffusionModel(Lambda(lambda x, t: dropout(x)), (0.1, 0.2), 3)
    dropout = model.eps_model.dropout = nn.Dropout(0.5)
    ones = torch.ones(4, 64)
    runs = [model.sample(4, (64,), "cpu", noise=lambda t: ones) for _ in range(2)]
    assert torch.equal(*runs)


def test_modes_are_restored_after_an_error():
    module = nn.Dropout()
    with pytest.raises(RuntimeError), evaluating(module):
        assert not module.training
        raise RuntimeError
    assert module.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "medium"}, "must be one of .*'large', 'small'.*, got 'medium'"),
        ({"noise": lambda t: torch.zeros(2, 3)}, r"shape \(4, 3\), got \(2, 3\)"),
    ],
)
def test_wrong_sampling_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        zero_model().sample(4, (3,), "cpu", **options)
