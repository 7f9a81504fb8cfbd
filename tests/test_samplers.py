"""The samplers: identities between them, each step written out, order of convergence, and diffusers' schedulers."""

import itertools
import math

import numpy as np
import pytest
import torch

from modeling.diffusion import DiffusionModel
from modeling.samplers import SAMPLERS, respaced_timesteps, sample
from modeling.schedules import cosine_betas
from tests.helpers import Lambda, gaussian_oracle, numpy_tables

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 13}, r"1\.\.12, got 13"),
        ({"num_steps": -1}, r"1\.\.12, got -1"),
        ({"sampler": "ddim", "eta": -1}, r"eta must be in \[0, 1\], got -1"),
        ({"sampler": "ancestral", "variance": "medium"}, "variance must be one of .*, got 'medium'"),
        ({"sampler": "euler"}, "sampler must be one of .*'ancestral', 'ddim', 'dpm_solver'.*, got 'euler'"),
        ({"noise": torch.zeros(2, 3)}, r"shape \(1, 3\), got \(2, 3\)"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(model(), 1, (3,), "cpu", **options)


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("variance", ["large", "small"])
def test_ancestral_with_all_steps_is_algorithm_2(variance, clip_x0):
    _, noise = noises()
    expected = model().sample(6, (3,), "cpu", variance=variance, clip_x0=clip_x0, noise=noise(0), step_noise=noise)
    found = sample(model(), 6, (3,), "cpu", variance=variance, clip_x0=clip_x0, noise=noise(0), step_noise=noise)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 5, T])
@pytest.mark.parametrize("clip_x0", [False, True])
def test_ddim_with_eta_1_is_ancestral_with_the_small_variance(clip_x0, num_steps):
    _, noise = noises()
    options = {"num_steps": num_steps, "clip_x0": clip_x0, "noise": noise(0), "step_noise": noise}
    found = sample(model(), 6, (3,), "cpu", sampler="ddim", eta=1.0, **options)
    expected = sample(model(), 6, (3,), "cpu", sampler="ancestral", variance="small", **options)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_the_predicted_x_0(sampler):
    _, noise = noises()
    _, x_0 = model().predict(noise(0), T)
    found = sample(model(), 6, (3,), "cpu", sampler=sampler, num_steps=1, clip_x0=False, noise=noise(0))
    torch.testing.assert_close(found, x_0)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_every_respaced_ancestral_step_is_the_posterior_of_the_shorter_chain(variance):
    """Bayes' rule with the chain's own beta = 1 - abar_t / abar_s: precisions add up."""
    abar = numpy_tables(BETAS, T)[2]
    table, noise = noises()
    x = table[0]
    for t, s in [(12, 8), (8, 4), (4, 0)]:
        x_0 = (x - np.sqrt(1 - abar[t]) * np.tanh(0.7 * x) * (t / T)) / np.sqrt(abar[t])
        alpha = abar[t] / abar[s]
        if s == 0:
            x = x_0
            continue
        precision = alpha / (1 - alpha) + 1 / (1 - abar[s])
        mean = (np.sqrt(alpha) * x / (1 - alpha) + np.sqrt(abar[s]) * x_0 / (1 - abar[s])) / precision
        x = mean + np.sqrt(1 - alpha if variance == "large" else 1 / precision) * table[t]
    found = sample(
        model(), 6, (3,), "cpu", num_steps=3, variance=variance, clip_x0=False, noise=noise(0), step_noise=noise
    )
    np.testing.assert_allclose(found.numpy(), x, atol=1e-5)


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
    sampled = sample(
        model(), 6, (3,), "cpu", sampler="ddim", num_steps=3, eta=eta, clip_x0=clip_x0, noise=noise(0), step_noise=noise
    )
    np.testing.assert_allclose(sampled.numpy(), x, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_the_deterministic_samplers_draw_no_noise(sampler):
    def step_noise(timestep):
        raise AssertionError(f"noise was asked for at {timestep}")

    sample(model(), 2, (3,), "cpu", sampler=sampler, num_steps=4, step_noise=step_noise)


def flow(x: torch.Tensor, std: float, abar: float, abar_next: float) -> torch.Tensor:
    """The probability-flow ODE for data N(0, s^2), solved exactly: x keeps its place in the marginal N(0, v_t)."""
    return x * math.sqrt((abar_next * std**2 + 1 - abar_next) / (abar * std**2 + 1 - abar))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver", 2)])
@pytest.mark.parametrize("std", [0.1, 0.5, 3.0])
def test_the_order_of_convergence_against_the_exact_flow(sampler, order, std):
    """Steps of equal length in lambda; halving them divides the error by 2^order: the slope is measured."""
    x_1 = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    ends = 4.0e-5, 0.999
    errors = []
    for num_steps in (160, 320, 640):
        log_snr = torch.linspace(*(math.log(abar / (1 - abar)) for abar in ends), num_steps + 1, dtype=torch.float64)
        abars = torch.sigmoid(log_snr).tolist()
        update, x = SAMPLERS[sampler](), x_1
        for abar, abar_next in itertools.pairwise(abars):
            eps = math.sqrt(1 - abar) * x / (abar * std**2 + 1 - abar)
            x = update(x, eps, (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar), abar, abar_next, lambda: 1 / 0)
        errors.append((x - flow(x_1, std, *ends)).abs().max().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.1)
    assert errors[2] < {1: 0.02, 2: 1e-3}[order] * std


def test_ddim_maps_a_gaussian_by_the_exact_flow():
    """With the process's own timesteps, down to clean data."""
    std = 0.3
    oracle = gaussian_oracle(std, (1e-4, 0.02), 1000)
    x_1 = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    exact = flow(x_1, std, numpy_tables((1e-4, 0.02), 1000)[2][-1], 1.0)
    errors = []
    for num_steps in (250, 500, 1000):
        found = sample(oracle, 3, (1,), "cpu", sampler="ddim", num_steps=num_steps, clip_x0=False, noise=x_1)
        errors.append((found - exact).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def scheduler_of_diffusers(sampler: str, options: dict, clip_x0: bool, schedule: str, prediction: str):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: requirements-dev.txt")
    common = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        "prediction_type": {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}[prediction],
        "timestep_spacing": "trailing",
    }
    if sampler == "ddim":
        return diffusers.DDIMScheduler(**common, clip_sample=clip_x0, set_alpha_to_one=True)
    if sampler == "ancestral":
        kind = {"large": "fixed_large", "small": "fixed_small"}[options["variance"]]
        return diffusers.DDPMScheduler(**common, clip_sample=clip_x0, variance_type=kind)
    assert not clip_x0
    return diffusers.DPMSolverMultistepScheduler(**common, final_sigmas_type="zero", lower_order_final=False)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers, with NumPy 2
@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("linear", "v"), ("cosine", "x_0")])
@pytest.mark.parametrize(
    ("sampler", "options", "clip_x0"),
    [
        ("ddim", {"eta": 0.0}, False),
        ("ddim", {"eta": 0.0}, True),
        ("ddim", {"eta": 0.7}, True),
        ("ancestral", {"variance": "large"}, True),
        ("ancestral", {"variance": "small"}, False),
        ("ancestral", {"variance": "small"}, True),
        ("dpm_solver", {}, False),
    ],
)
def test_every_step_agrees_with_the_scheduler_of_diffusers(
    sampler, options, clip_x0, schedule, prediction, monkeypatch
):
    """The same network, the same noise, 20 of 1000 steps; theirs gets our noise in the place of its own."""
    net = Lambda(lambda x, t: torch.tanh(0.7 * x) * (0.2 + t[:, None, None, None]))
    betas = cosine_betas(1000) if schedule == "cosine" else (1e-4, 0.02)
    ours = DiffusionModel(net, betas, 1000, prediction=prediction)
    theirs = scheduler_of_diffusers(sampler, options, clip_x0, schedule, prediction)
    theirs.set_timesteps(20)
    noise = torch.randn(1001, 2, 3, 4, 4)
    seen = {}
    found = sample(
        ours, 2, (3, 4, 4), "cpu", sampler=sampler, num_steps=20, clip_x0=clip_x0, noise=noise[0],
        step_noise=lambda timestep: noise[timestep],
        observe=lambda timestep, x, x_0: seen.__setitem__(timestep, x), **options,
    )  # fmt: skip
    assert [timestep - 1 for timestep in seen] == theirs.timesteps.tolist()  # theirs count from 0
    x = noise[0]
    for timestep in theirs.timesteps.tolist():
        torch.testing.assert_close(x, seen[timestep + 1], atol=2e-4, rtol=2e-4)
        is_last = timestep == theirs.timesteps[-1]
        drawn = (
            torch.zeros_like(x) if is_last else noise[timestep + 1]
        )  # Algorithm 2 ends without noise, theirs may not
        step_options = {}
        if sampler == "ddim":
            step_options = {"eta": options["eta"], "variance_noise": drawn, "use_clipped_model_output": clip_x0}
        elif sampler == "ancestral":
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *shape, drawn=drawn, **where: drawn
            )
        x = theirs.step(net(x, torch.full((2,), (timestep + 1) / 1000)), timestep, x, **step_options).prev_sample
    torch.testing.assert_close(x, found, atol=2e-4, rtol=2e-4)


def test_sampling_restores_the_mode_and_repeats_by_generator(device):
    net = model().to(device)
    draws = [
        sample(net, 2, (3,), device, num_steps=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert net.training
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].abs().max() <= 1
