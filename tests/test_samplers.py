"""Respaced sampling: what it is at its ends (DDIM, ancestral), and each of its steps."""

import numpy as np
import pytest
import torch

from modeling.diffusion import DiffusionModel
from modeling.samplers import respaced_timesteps, sample_respaced
from tests.test_diffusion import Lambda, gaussian_oracle, numpy_tables

BETAS, T = (0.01, 0.3), 12


def model() -> DiffusionModel:
    return DiffusionModel(Lambda(lambda x, t: torch.tanh(0.7 * x) * t[:, None]), BETAS, T)


def noises(count=6):
    table = np.random.default_rng(1).normal(size=(T + 1, count, 3))
    return table, lambda timestep: torch.from_numpy(table[timestep]).float()


def test_timesteps_are_evenly_spaced_from_the_last():
    assert respaced_timesteps(1000, 4) == [1000, 750, 500, 250]
    assert respaced_timesteps(5, 5) == [5, 4, 3, 2, 1]
    assert respaced_timesteps(1000, 1) == [1000]
    assert len(set(respaced_timesteps(1000, 999))) == 999


@pytest.mark.parametrize("num_steps", [0, 13])
def test_more_steps_than_timesteps_are_refused(num_steps):
    with pytest.raises(ValueError, match=rf"1\.\.12, got {num_steps}"):
        sample_respaced(model(), 1, (3,), "cpu", num_steps=num_steps)


def test_a_negative_eta_is_refused():
    with pytest.raises(ValueError, match="eta must not be negative, got -1"):
        sample_respaced(model(), 1, (3,), "cpu", num_steps=2, eta=-1)


@pytest.mark.parametrize("clip_x0", [False, True])
def test_all_steps_with_eta_1_are_ancestral_with_the_posterior_variance(clip_x0):
    _, noise = noises()
    ancestral = model().sample(6, (3,), "cpu", variance="small", clip_x0=clip_x0, noise=noise(0), step_noise=noise)
    respaced = sample_respaced(
        model(), 6, (3,), "cpu", num_steps=T, eta=1.0, clip_x0=clip_x0, noise=noise(0), step_noise=noise
    )
    torch.testing.assert_close(respaced, ancestral, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip_x0", [False, True])
def test_every_step_is_eq_12_written_out(eta, clip_x0):
    abar = numpy_tables(BETAS, T)[2]
    table, noise = noises()
    x = table[0]
    for t, s in [(12, 8), (8, 4), (4, 0)]:
        eps = np.tanh(0.7 * x) * (t / T)
        x_0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        if clip_x0:
            x_0 = np.clip(x_0, -1, 1)
            eps = (x - np.sqrt(abar[t]) * x_0) / np.sqrt(1 - abar[t])
        sigma = eta * np.sqrt((1 - abar[s]) / (1 - abar[t])) * np.sqrt(1 - abar[t] / abar[s])
        x = np.sqrt(abar[s]) * x_0 + np.sqrt(1 - abar[s] - sigma**2) * eps + sigma * table[t]
    sampled = sample_respaced(
        model(), 6, (3,), "cpu", num_steps=3, eta=eta, clip_x0=clip_x0, noise=noise(0), step_noise=noise
    )
    np.testing.assert_allclose(sampled.numpy(), x, atol=1e-5)


def test_ddim_draws_no_noise():
    def step_noise(timestep):
        raise AssertionError(f"noise was asked for at {timestep}")

    sample_respaced(model(), 2, (3,), "cpu", num_steps=4, eta=0.0, step_noise=step_noise)


def test_ddim_maps_a_gaussian_by_the_exact_flow():
    """For data N(0, s^2) the probability-flow ODE is x -> s x (almost: abar_T > 0); DDIM reaches it with many steps."""
    std = 0.3
    oracle = gaussian_oracle(std, (1e-4, 0.02), 1000)
    x_1 = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    abar = numpy_tables((1e-4, 0.02), 1000)[2][-1]
    exact = x_1 * std / np.sqrt(abar * std**2 + 1 - abar)
    errors = []
    for num_steps in (250, 500, 1000):
        found = sample_respaced(oracle, 3, (1,), "cpu", num_steps=num_steps, eta=0.0, clip_x0=False, noise=x_1)
        errors.append((found - exact).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_sampling_restores_the_mode_and_repeats_by_generator(device):
    net = model().to(device)
    draws = [
        sample_respaced(net, 2, (3,), device, num_steps=4, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert net.training
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].abs().max() <= 1
