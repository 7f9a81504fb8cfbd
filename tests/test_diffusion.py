"""The forward process, the predictions and the loss against closed forms, written out independently in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from modeling.diffusion import DiffusionModel
from tests.helpers import BETAS, Lambda, T, gaussian_oracle, numpy_tables, zero_model

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("timestep", [1, 2, 500, 1000])
def test_x_t_has_the_mean_and_variance_of_eq_4(timestep):
    model, count = zero_model(), 400_000
    abar = numpy_tables(BETAS, T)[2][timestep].item()
    x_t = model.q_sample(torch.full((count, 1), 0.7), torch.full((count,), timestep), torch.randn(count, 1)).double()
    assert x_t.mean().item() == pytest.approx(0.7 * abar**0.5, abs=5 * ((1 - abar) / count) ** 0.5 + 1e-7)
    assert x_t.var().item() == pytest.approx(1 - abar, rel=5 * (2 / count) ** 0.5)


def test_many_small_steps_are_one_step_of_eq_4():
    """x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z_t, unrolled, has the coefficients that q_sample uses."""
    beta, alpha, _ = numpy_tables(BETAS, T)
    mean, variance = 1.0, 0.0
    model = zero_model()
    for timestep in range(1, T + 1):
        mean, variance = mean * alpha[timestep] ** 0.5, variance * alpha[timestep] + beta[timestep]
        assert model.sqrt_alphas_cumprod[timestep].item() == pytest.approx(mean, rel=1e-6)
        assert model.sqrt_one_minus_alpha_prod[timestep].item() ** 2 == pytest.approx(variance, rel=1e-6)


def test_the_network_is_shown_x_t_and_t_of_each_image():
    seen = {}

    def record(x, t):
        seen["x"], seen["t"] = x, t
        return torch.zeros_like(x)

    model = DiffusionModel(Lambda(record), BETAS, T)
    x_0, noise = torch.rand(3, 3, 4, 4) * 2 - 1, torch.randn(3, 3, 4, 4)
    timesteps = torch.tensor([1, 500, 1000])
    loss = model(x_0, timesteps=timesteps, noise=noise)
    assert seen["t"].tolist() == pytest.approx([0.001, 0.5, 1.0])
    abar = numpy_tables(BETAS, T)[2][timesteps.numpy()][:, None, None, None]
    expected = np.sqrt(abar) * x_0.numpy() + np.sqrt(1 - abar) * noise.numpy()
    np.testing.assert_allclose(seen["x"].numpy(), expected, atol=1e-6)
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-6)


def test_the_loss_is_the_mean_squared_error_of_the_noise():
    model = DiffusionModel(Lambda(lambda x, t: x * 0.5 + t[:, None]), BETAS, T)
    x_0, noise, timesteps = torch.rand(5, 7), torch.randn(5, 7), torch.randint(1, T + 1, (5,))
    predicted = model.q_sample(x_0, timesteps, noise) * 0.5 + timesteps[:, None] / T
    expected = (predicted - noise).double().square().mean().item()
    assert model(x_0, timesteps=timesteps, noise=noise).item() == pytest.approx(expected, rel=1e-6)
    assert model.losses(x_0, timesteps, noise).shape == (5,)


def test_the_loss_of_the_best_predictor_is_the_variance_that_remains():
    """E (eps - E[eps | x_t])^2 = abar s^2 / (abar s^2 + 1 - abar) for data N(0, s^2)."""
    std, count = 0.5, 400_000
    model = gaussian_oracle(std)
    for timestep in (10, 200, 900):
        abar = numpy_tables(BETAS, T)[2][timestep]
        loss = model(std * torch.randn(count, 1), timesteps=torch.full((count,), timestep), noise=torch.randn(count, 1))
        expected = abar * std**2 / (abar * std**2 + 1 - abar)
        assert loss.item() == pytest.approx(expected, rel=5 * (2 / count) ** 0.5)


def test_missing_timesteps_and_noise_come_from_the_default_generator():
    """Timesteps uniform over all of 1..T, noise standard normal; and repeatable by torch.manual_seed."""
    seen = []

    def record(x, t):
        seen.append((t * 4).round().long())
        return torch.zeros_like(x)

    model, x = DiffusionModel(Lambda(record), (0.1, 0.2), 4), torch.zeros(40_000, 1)
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x))
    assert not torch.equal(first, model(x))
    counts = seen[0].bincount(minlength=5)
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:] / 40_000, torch.full((4,), 0.25), atol=0.0125, rtol=0)
    assert first.item() == pytest.approx(1, abs=5 * (2 / 40_000) ** 0.5)  # noise has variance 1: randn, not rand


@pytest.mark.parametrize(
    ("timesteps", "noise_shape", "message"),
    [
        ([0, 1], (2, 3), r"must be in 1..1000, got \[0, 1\]"),
        ([1, 1001], (2, 3), r"must be in 1..1000, got \[1, 1001\]"),
        ([1], (2, 3), r"integers of shape \(2,\), got torch.int64 of shape \(1,\)"),
        ([1.0, 2.0], (2, 3), r"integers of shape \(2,\), got torch.float32"),
        ([1, 2], (2, 4), r"shape of x, \(2, 3\), got \(2, 4\)"),
    ],
)
def test_wrong_timesteps_or_noise_are_rejected(timesteps, noise_shape, message):
    with pytest.raises(ValueError, match=message):
        zero_model()(torch.zeros(2, 3), timesteps=torch.tensor(timesteps), noise=torch.zeros(noise_shape))


def test_inputs_may_start_on_the_cpu_whatever_the_device(device):
    model = DiffusionModel(Lambda(lambda x, t: x), BETAS, T).to(device)
    loss = model(torch.zeros(2, 3), timesteps=torch.tensor([1, 2]), noise=torch.zeros(2, 3))
    assert loss.device.type == device
    assert model.sample(2, (3,), device).device.type == device


def test_no_tensor_is_left_on_another_device():
    """The "meta" device computes shapes only, but rejects a mixture with the CPU as a GPU would, without a GPU."""
    model = DiffusionModel(Lambda(lambda x, t: x * t[:, None]), BETAS, 5).to("meta")
    assert model(torch.zeros(2, 3)).device.type == "meta"
    given = model(torch.zeros(2, 3), timesteps=torch.tensor([1, 2]), noise=torch.zeros(2, 3))
    assert given.device.type == "meta"
    assert model.sample(2, (3,), "meta").device.type == "meta"
    assert model.sample(2, (3,), "meta", clip_x0=True).device.type == "meta"
    assert model.sample(2, (3,), "meta", noise=lambda t: torch.zeros(2, 3)).device.type == "meta"


# ---- what the network predicts


def knowing(prediction: str, x_0: torch.Tensor, noise: torch.Tensor, **options) -> DiffusionModel:
    """A network that predicts what is asked of it without error, for x_t made of this x_0 and this noise."""

    def output(x, t):
        model = zero_model()
        timesteps = (t * T).round().long()
        a, b = model.sqrt_alphas_cumprod[timesteps][:, None], model.sqrt_one_minus_alpha_prod[timesteps][:, None]
        return {"eps": noise, "x_0": x_0, "v": a * noise - b * x_0}[prediction]

    return DiffusionModel(Lambda(output), BETAS, T, prediction=prediction, **options)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_eps_and_x_0_are_recovered_from_x_t_and_any_prediction(prediction):
    x_0, noise = torch.rand(3, 5) * 2 - 1, torch.randn(3, 5)
    model = knowing(prediction, x_0, noise)
    for timesteps in (torch.tensor([1, 300, 800]), 1, 300, 800):
        x_t = model.q_sample(x_0, torch.as_tensor(timesteps).expand(3), noise)
        eps, found = model.predict(x_t, timesteps)
        torch.testing.assert_close(eps, noise, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found, x_0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr_5"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_the_target_of_every_prediction_is_what_recovers_x_0(prediction, weighting):
    """The loss is 0 exactly where `predict` is right."""
    x_0, noise, timesteps = torch.rand(4, 5) * 2 - 1, torch.randn(4, 5), torch.tensor([1, 20, 500, 1000])
    losses = knowing(prediction, x_0, noise, weighting=weighting).losses(x_0, timesteps, noise)
    assert losses.max() < 1e-12
    wrong = knowing(prediction, x_0 + 1, noise + 1, weighting=weighting).losses(x_0, timesteps, noise)
    assert wrong.min() > 0


def test_min_snr_weighs_the_same_error_of_x_0_equally_in_all_predictions():
    """Hang et al. 2023: min(SNR, 5) times the squared error of x_0, whatever the network predicts."""
    x_0, noise, off = torch.zeros(4, 5), torch.randn(4, 5), torch.randn(4, 5)
    timesteps = torch.tensor([1, 100, 500, 1000])
    abar = torch.from_numpy(numpy_tables(BETAS, T)[2])[timesteps]
    expected = (abar / (1 - abar)).clamp(max=5) * off.double().square().mean(1)
    a, b = abar.sqrt()[:, None], (1 - abar).sqrt()[:, None]
    for prediction in ("eps", "x_0", "v"):
        # x_0 wrong by `off` at the same x_t is eps wrong by -a/b off, and v = (a x_t - x_0) / b wrong by -off/b
        error = {"eps": -a / b, "x_0": torch.ones_like(a), "v": -1 / b}[prediction] * off
        right = {"eps": noise, "x_0": x_0, "v": a * noise - b * x_0}[prediction]
        net = Lambda(lambda x, t, output=right + error: output)
        model = DiffusionModel(net, BETAS, T, prediction=prediction, weighting="min_snr_5")
        torch.testing.assert_close(model.losses(x_0, timesteps, noise).double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr_5"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_on_gaussian_data_every_loss_has_the_same_optimum(prediction, weighting):
    """The best scale k of a prediction k x_t, by least squares on the loss itself, is that of E[. | x_t]."""
    std, timestep, count = 0.5, 400, 200_000
    abar = numpy_tables(BETAS, T)[2][timestep]
    variance = abar * std**2 + 1 - abar
    best = {
        "eps": (1 - abar) ** 0.5 / variance,
        "x_0": abar**0.5 * std**2 / variance,
        "v": (abar * (1 - abar)) ** 0.5 * (1 - std**2) / variance,
    }[prediction]
    x_0, noise = std * torch.randn(count, 1), torch.randn(count, 1)
    timesteps = torch.full((count,), timestep)

    def loss(k):
        net = Lambda(lambda x, t: k * x)
        model = DiffusionModel(net, BETAS, T, prediction=prediction, weighting=weighting)
        return model.losses(x_0, timesteps, noise).double().mean().item()

    below, middle, above = loss(best - 1), loss(best), loss(best + 1)  # a parabola in k
    minimum = best + 0.5 * (below - above) / (below - 2 * middle + above)
    assert minimum == pytest.approx(best, abs=0.01)


def test_held_out_losses_of_all_predictions_are_in_eps():
    x_0, noise, timesteps = torch.rand(4, 5) * 2 - 1, torch.randn(4, 5), torch.tensor([1, 20, 500, 1000])
    for prediction in ("eps", "x_0", "v"):
        model = knowing(prediction, x_0, noise, weighting="min_snr_5")
        assert model.eps_losses(x_0, timesteps, noise).max() < 1e-6
    blind = zero_model()
    torch.testing.assert_close(blind.eps_losses(x_0, timesteps, noise), noise.square().mean(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "score"}, "prediction must be one of .*'eps', 'x_0', 'v'.*, got 'score'"),
        ({"weighting": "snr"}, "weighting must be one of .*, got 'snr'"),
        ({"betas": torch.full((4,), 0.1)}, r"betas must have shape \(5,\), got \(4,\)"),
        ({"betas": torch.full((5,), 1.0)}, r"numbers in \(0, 1\)"),
    ],
)
def test_wrong_processes_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModel(nn.Identity(), options.pop("betas", (0.1, 0.2)), 5, **options)


def test_betas_may_be_given_one_by_one():
    given = DiffusionModel(nn.Identity(), torch.linspace(*BETAS, T, dtype=torch.float64), T)
    assert torch.equal(given.schedules_float64["betas"], zero_model().schedules_float64["betas"])
