"""The samplers: identities between them, each step written out, order of convergence, and diffusers' schedulers."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from modeling.diffusion import DiffusionModel
from modeling.samplers import SAMPLERS, Sampler, sample
from modeling.schedules import cosine_betas
from tests.helpers import Lambda, gaussian_oracle, numpy_tables

pytestmark = pytest.mark.numeric

BETAS, T = (0.01, 0.3), 12


def model() -> DiffusionModel:
    return DiffusionModel(Lambda(lambda x, t: torch.tanh(0.7 * x) * t[:, None]), BETAS, T)


def noises(count=6):
    table = np.random.default_rng(1).normal(size=(T + 1, count, 3))
    return table, lambda timestep: torch.from_numpy(table[timestep]).float()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must be at least 1, got -1"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"spacing": "even"}, "spacing must be one of .*, got 'even'"),
        ({"name": "ddim", "eta": -1}, r"eta must be in \[0, 1\], got -1"),
        ({"name": "ddim", "variance": "small"}, "variance must be None with the sampler ddim, got small"),
        ({"name": "ancestral", "eta": 0.0}, "eta must be None with the sampler ancestral, got 0.0"),
        ({"name": "ancestral", "variance": "medium"}, "variance must be one of .*, got 'medium'"),
        ({"name": "euler"}, "sampler must be one of .*'ancestral', 'ddim', 'dpm_solver'.*, got 'euler'"),
    ],
)
def test_wrong_samplers_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


def test_noise_of_another_shape_is_rejected():
    with pytest.raises(ValueError, match=r"shape \(1, 3\), got \(2, 3\)"):
        sample(model(), 1, (3,), "cpu", noise=lambda timestep: torch.zeros(2, 3))


def test_samplers_that_draw_the_same_images_are_equal():
    assert Sampler() == Sampler("ancestral", variance="small")
    assert Sampler("ddim") == Sampler("ddim", eta=0.0)
    assert Sampler("ddim") != Sampler("ddim", eta=1.0)


def test_the_default_timesteps_are_those_that_suit_the_sampler():
    defaults = {name: Sampler(name).spacing for name in SAMPLERS}
    assert defaults == {"ancestral": "trailing", "ddim": "quadratic", "dpm_solver": "quadratic"}


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("variance", ["large", "small"])
def test_ancestral_with_all_steps_is_algorithm_2(variance, clip_x0):
    _, noise = noises()
    expected = model().sample(6, (3,), "cpu", variance=variance, clip_x0=clip_x0, noise=noise)
    found = sample(model(), 6, (3,), "cpu", Sampler(variance=variance, clip_x0=clip_x0), noise=noise)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 5, T])
@pytest.mark.parametrize("clip_x0", [False, True])
def test_ddim_with_eta_1_is_ancestral_with_the_small_variance(clip_x0, num_steps):
    _, noise = noises()
    found = sample(
        model(), 6, (3,), "cpu", Sampler("ddim", num_steps, clip_x0, eta=1.0, spacing="trailing"), noise=noise
    )
    expected = sample(model(), 6, (3,), "cpu", Sampler("ancestral", num_steps, clip_x0, "small"), noise=noise)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_predicted_x_0(name):
    _, noise = noises()
    _, x_0 = model().predict(noise(0), T)
    found = sample(model(), 6, (3,), "cpu", Sampler(name, num_steps=1, clip_x0=False), noise=noise)
    torch.testing.assert_close(found, x_0)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_a_respaced_ancestral_step_is_the_posterior_of_the_shorter_chain(variance):
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
    found = sample(model(), 6, (3,), "cpu", Sampler("ancestral", 3, clip_x0=False, variance=variance), noise=noise)
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
    sampled = sample(model(), 6, (3,), "cpu", Sampler("ddim", 3, clip_x0, eta=eta, spacing="trailing"), noise=noise)
    np.testing.assert_allclose(sampled.numpy(), x, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_the_deterministic_samplers_draw_no_noise_but_the_start(name):
    asked = []
    sample(model(), 2, (3,), "cpu", Sampler(name, 4), noise=lambda t: asked.append(t) or torch.zeros(2, 3))
    assert asked == [0]


def draw_nothing() -> torch.Tensor:
    raise AssertionError("a deterministic sampler draws noise")


def flow(x: torch.Tensor, std: float, abar: float, abar_next: float) -> torch.Tensor:
    """The exact probability flow for data N(0, s^2): x keeps its quantile in the marginal N(0, v_t)."""
    return x * math.sqrt((abar_next * std**2 + 1 - abar_next) / (abar * std**2 + 1 - abar))


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver", 2)])
@pytest.mark.parametrize("std", [0.1, 0.5, 3.0])
def test_the_order_of_convergence_in_equal_steps_of_lambda(name, order, std):
    """Against the exact flow, not down to clean data; halving the steps divides the error by 2^order."""
    x_1 = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    ends = 4.0e-5, 0.999
    errors = []
    for num_steps in (160, 320, 640):
        start, end = (math.log(abar / (1 - abar)) for abar in ends)
        abars = torch.sigmoid(torch.linspace(start, end, num_steps + 1, dtype=torch.float64)).tolist()
        update, x = Sampler(name).make_update(), x_1
        for abar, abar_next in itertools.pairwise(abars):
            eps = math.sqrt(1 - abar) * x / (abar * std**2 + 1 - abar)
            x = update(x, eps, (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar), abar, abar_next, draw_nothing)
        errors.append((x - flow(x_1, std, *ends)).abs().max().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.1)
    assert errors[2] < {1: 0.02, 2: 1e-3}[order] * std


def test_ddim_maps_a_gaussian_by_the_exact_flow():
    """With the process's own timesteps, down to clean data."""
    std, oracle = 0.3, gaussian_oracle(0.3)
    x_1 = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    exact = flow(x_1, std, oracle.schedules_float64["alphas_cumprod"][-1].item(), 1.0)
    errors = []
    for num_steps in (250, 500, 1000):
        found = sample(oracle, 3, (1,), "cpu", Sampler("ddim", num_steps, clip_x0=False), noise=lambda timestep: x_1)
        errors.append((found - exact).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def scheduler_of_diffusers(sampler: Sampler, schedule: str, prediction: str):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: requirements-dev.txt")
    common = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        "prediction_type": {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}[prediction],
        "timestep_spacing": "trailing",
    }
    if sampler.name == "ddim":
        return diffusers.DDIMScheduler(**common, clip_sample=sampler.clip_x0, set_alpha_to_one=True)
    if sampler.name == "ancestral":
        return diffusers.DDPMScheduler(**common, clip_sample=sampler.clip_x0, variance_type=f"fixed_{sampler.variance}")
    assert not sampler.clip_x0
    return diffusers.DPMSolverMultistepScheduler(**common, final_sigmas_type="zero", lower_order_final=False)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers, with NumPy 2
@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("linear", "v"), ("cosine", "x_0")])
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler("ddim", 20, clip_x0=False, spacing="trailing"),
        Sampler("ddim", 20, spacing="trailing"),
        Sampler("ddim", 20, eta=0.7, spacing="trailing"),
        Sampler("ancestral", 20, variance="large"),
        Sampler("ancestral", 20, clip_x0=False),
        Sampler("ancestral", 20),
        Sampler("dpm_solver", 20, clip_x0=False, spacing="trailing"),
    ],
    ids=str,
)
def test_every_step_agrees_with_the_scheduler_of_diffusers(sampler, schedule, prediction, monkeypatch):
    """The same network, the same noise, 20 of 1000 steps; theirs gets our noise instead of its own."""
    net = Lambda(lambda x, t: torch.tanh(0.7 * x) * (0.2 + t[:, None, None, None]))
    betas = cosine_betas(1000) if schedule == "cosine" else (1e-4, 0.02)
    ours = DiffusionModel(net, betas, 1000, prediction=prediction)
    theirs = scheduler_of_diffusers(sampler, schedule, prediction)
    theirs.set_timesteps(20)
    noise = torch.randn(1001, 2, 3, 4, 4)
    seen: dict[int, torch.Tensor] = {}
    found = sample(
        ours, 2, (3, 4, 4), "cpu", sampler, noise=lambda timestep: noise[timestep],
        observe=lambda timestep, x, x_0: seen.__setitem__(timestep, x),
    )  # fmt: skip
    assert [timestep - 1 for timestep in seen] == theirs.timesteps.tolist()  # theirs count from 0
    x = noise[0]
    for timestep in theirs.timesteps.tolist():
        torch.testing.assert_close(x, seen[timestep + 1], atol=2e-4, rtol=2e-4)
        # Algorithm 2 ends without noise, theirs may not.
        drawn = torch.zeros_like(x) if timestep == theirs.timesteps[-1] else noise[timestep + 1]
        step_options = {}
        if sampler.name == "ddim":
            step_options = {"eta": sampler.eta, "use_clipped_model_output": sampler.clip_x0, "variance_noise": drawn}
        elif sampler.name == "ancestral":
            module = sys.modules[type(theirs).__module__]
            monkeypatch.setattr(module, "randn_tensor", lambda *shape, drawn=drawn, **where: drawn)
        x = theirs.step(net(x, torch.full((2,), (timestep + 1) / 1000)), timestep, x, **step_options).prev_sample
    torch.testing.assert_close(x, found, atol=2e-4, rtol=2e-4)


def test_sampling_restores_the_mode_and_repeats_by_seed(device):
    net, few = model().to(device), Sampler(num_steps=4)
    draws = [sample(net, 2, (3,), device, few) for seed in (1, 1, 2) if torch.manual_seed(seed)]
    assert net.training
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].abs().max() <= 1
