"""The diffusion process against closed forms, written out independently in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from modeling.diffusion import DiffusionModel, evaluating, get_schedules
from tests.helpers import BETAS, Lambda, T, gaussian_oracle, numpy_tables, zero_model

# ---- schedules


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
    assert model.alphas_cumprod[1000].item() == pytest.approx(4.03583e-5, rel=1e-5)
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
def test_wrong_schedules_are_refused(betas, num_timesteps, message):
    with pytest.raises(ValueError, match=message):
        get_schedules(*betas, num_timesteps)
    with pytest.raises(ValueError, match=message):
        zero_model(betas, num_timesteps)


# ---- the forward process and the loss


@pytest.mark.parametrize("timestep", [1, 2, 500, 1000])
def test_x_t_has_the_mean_and_variance_of_eq_4(timestep):
    model, count = zero_model(), 400_000
    abar = numpy_tables(BETAS, T)[2][timestep]
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


def test_what_is_not_handed_in_is_drawn_from_the_default_generator():
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
def test_wrong_timesteps_or_noise_are_refused(timesteps, noise_shape, message):
    with pytest.raises(ValueError, match=message):
        zero_model()(torch.zeros(2, 3), timesteps=torch.tensor(timesteps), noise=torch.zeros(noise_shape))


def test_inputs_may_start_on_the_cpu_whatever_the_device(device):
    model = DiffusionModel(nn.Identity(), BETAS, T)
    model.eps_model.forward = lambda x, t: x
    model.to(device)
    loss = model(torch.zeros(2, 3), timesteps=torch.tensor([1, 2]), noise=torch.zeros(2, 3))
    assert loss.device.type == device
    assert model.sample(2, (3,), device).device.type == device


def test_no_tensor_is_left_on_another_device():
    """The "meta" device computes shapes only, but refuses to mix with the CPU as a GPU would: it needs no GPU."""
    model = DiffusionModel(Lambda(lambda x, t: x * t[:, None]), BETAS, 5).to("meta")
    assert model(torch.zeros(2, 3)).device.type == "meta"
    given = model(torch.zeros(2, 3), timesteps=torch.tensor([1, 2]), noise=torch.zeros(2, 3))
    assert given.device.type == "meta"
    for options in ({}, {"clip_x0": True}, {"noise": torch.zeros(2, 3), "step_noise": lambda t: torch.zeros(2, 3)}):
        assert model.sample(2, (3,), "meta", **options).device.type == "meta"


# ---- the reverse process


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
def test_wrong_processes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModel(nn.Identity(), options.pop("betas", (0.1, 0.2)), 5, **options)


def test_betas_may_be_given_one_by_one():
    given = DiffusionModel(nn.Identity(), torch.linspace(*BETAS, T, dtype=torch.float64), T)
    assert torch.equal(given.schedules_float64["betas"], zero_model().schedules_float64["betas"])


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

    def step_noise(timestep):
        asked.append(timestep)
        return torch.from_numpy(noises[timestep]).float()

    sampled = model.sample(
        5, (2, 3), "cpu", variance=variance, clip_x0=clip_x0, noise=torch.from_numpy(noises[0]).float(),
        step_noise=step_noise,
    )  # fmt: skip
    assert asked == list(range(steps, 1, -1))
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
    response = model.sample(
        num_timesteps + 1, (1,), "cpu", variance=variance, noise=unit[:, :1], step_noise=lambda t: unit[:, t : t + 1]
    )
    assert response.square().sum().item() == pytest.approx(
        chain_variance(data_std, variance, betas, num_timesteps), rel=1e-6
    )
    silent = model.sample(
        1, (1,), "cpu", variance=variance, noise=torch.zeros(1, 1), step_noise=lambda t: torch.zeros(1, 1)
    )
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


def test_sampling_is_repeatable_by_generator_and_differs_between_seeds():
    model = gaussian_oracle(0.5, (0.1, 0.5), 5)
    draw = [model.sample(3, (2,), "cpu", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
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
    zeros = torch.ones(4, 64)
    runs = [model.sample(4, (64,), "cpu", noise=zeros, step_noise=lambda t: zeros) for _ in range(2)]
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
        ({"noise": torch.zeros(2, 3)}, r"shape \(4, 3\), got \(2, 3\)"),
    ],
)
def test_wrong_sampling_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        zero_model().sample(4, (3,), "cpu", **options)
