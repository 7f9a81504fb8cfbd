"""The bound against its closed forms: Gaussian data, the formula of its terms, the decoder's probabilities."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from modeling.diffusion import DiffusionModel
from modeling.evaluation import bits_per_dim, discretized_log_likelihood, measure_errors, summarise
from modeling.images import to_model_range, to_uint8
from modeling.measures.linear_denoiser import LinearDenoiser, fit_linear_denoiser
from modeling.schedules import cosine_betas
from modeling.seeding import Purpose, draw_normal
from tests.helpers import BETAS, Lambda, T, gaussian_oracle, numpy_tables, random_images

pytestmark = pytest.mark.numeric


def images(count=12) -> torch.Tensor:
    return random_images(count, 3, 4, 4)


def gaussian_images(std: float, count: int) -> torch.Tensor:
    """Rounded to grey levels; none falls outside them."""
    return to_uint8(std * torch.randn(count, 3, 8, 8, generator=torch.manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("mean", [-1.7, -1.0, -0.3, 0.0019, 0.99, 30.0])
@pytest.mark.parametrize("std", [0.00738, 0.2])
def test_the_256_levels_have_all_the_probability(mean, std):
    levels = torch.arange(256).double() / 127.5 - 1
    log_likelihood = discretized_log_likelihood(levels, torch.full((256,), mean), std)
    assert torch.isfinite(log_likelihood).all()
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_a_level_has_the_difference_of_two_normal_distribution_functions():
    x, mean, std = 64 / 127.5 - 1, -0.45, 0.1
    ndtr = lambda z: 0.5 * (1 + math.erf(z / 2**0.5))  # noqa: E731
    expected = math.log(ndtr((x + 1 / 255 - mean) / std) - ndtr((x - 1 / 255 - mean) / std))
    found = discretized_log_likelihood(torch.tensor(x), torch.tensor(mean), std)
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_every_term_is_the_formula_of_its_mean_squared_error(variance):
    """L_{t-1} = c_t + w_t MSE_t, written out in NumPy for a network that is wrong in a known way."""
    num_timesteps, betas = 7, (0.01, 0.3)
    beta, alpha, abar = numpy_tables(betas, num_timesteps)
    model = DiffusionModel(Lambda(lambda x, t: torch.tanh(x) * t[:, None, None, None]), betas, num_timesteps)
    batch = images()
    x_0 = to_model_range(batch).double().numpy()
    found = bits_per_dim(model, batch, variance)
    posterior = (1 - abar[:-1]) / (1 - abar[1:]) * beta[1:]  # of t = 1..T
    terms = []
    for t in range(2, num_timesteps + 1):
        noise = draw_normal(0, Purpose.EVALUATION, t - 1, torch.arange(12), (3, 4, 4)).double().numpy()
        x_t = np.sqrt(abar[t]) * x_0 + np.sqrt(1 - abar[t]) * noise
        mse = np.square(noise - np.tanh(x_t) * t / num_timesteps).mean()
        sigma2 = beta[t] if variance == "large" else posterior[t - 1]
        c = 0.5 * (np.log(sigma2 / posterior[t - 1]) - 1 + posterior[t - 1] / sigma2)
        terms.append((c + beta[t] ** 2 / (2 * sigma2 * alpha[t] * (1 - abar[t])) * mse) / np.log(2))
    np.testing.assert_allclose(found.terms.numpy(), terms, rtol=1e-5)
    prior = 0.5 * (abar[-1] * np.square(x_0).mean() + 1 - abar[-1] - 1 - np.log(1 - abar[-1])) / np.log(2)
    assert found.prior == pytest.approx(prior, rel=1e-6)
    assert found.rate == pytest.approx(sum(terms) + prior, rel=1e-5)
    assert found.total == pytest.approx(found.rate + found.distortion, rel=1e-12)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_decoder_has_the_posterior_variance_of_timestep_2_in_both(variance):
    """L_0 written out in NumPy: sigma_1^2 = btilde_2."""
    num_timesteps, betas = 7, (1e-4, 2e-4)
    abar = numpy_tables(betas, num_timesteps)[2]
    model = DiffusionModel(Lambda(lambda x, t: 0.9 * x), betas, num_timesteps)
    batch = images()
    x_0 = to_model_range(batch).double().numpy()
    x_1 = np.sqrt(abar[1]) * x_0
    x_1 += np.sqrt(1 - abar[1]) * draw_normal(0, Purpose.EVALUATION, 0, torch.arange(12), (3, 4, 4)).double().numpy()
    mean = (x_1 - np.sqrt(1 - abar[1]) * 0.9 * x_1) / np.sqrt(abar[1])
    std = np.sqrt((1 - abar[1]) / (1 - abar[2]) * betas[0] * (1 + 1 / 6))
    ndtr = np.vectorize(lambda z: 0.5 * math.erfc(-z / 2**0.5))
    upper = np.where(x_0 > 0.999, 1, ndtr((x_0 + 1 / 255 - mean) / std))
    lower = np.where(x_0 < -0.999, 0, ndtr((x_0 - 1 / 255 - mean) / std))
    expected = -np.log2(upper - lower).mean()
    assert bits_per_dim(model, batch, variance).distortion == pytest.approx(expected, rel=1e-5)


def test_images_may_be_measured_in_parts():
    model = gaussian_oracle(0.5, (0.01, 0.3), 20)
    whole = measure_errors(model, images(), timesteps_per_image=6)
    parts = [measure_errors(model, images()[i : i + 5], timesteps_per_image=6, first_image=i) for i in (0, 5, 10)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_dropout_is_off_while_measuring(device):
    net = nn.Sequential(nn.Dropout(0.5))
    model = DiffusionModel(Lambda(lambda x, t: net(x)), (0.01, 0.3), 20).to(device)
    model.eps_model.net = net
    assert torch.equal(measure_errors(model, images()), measure_errors(model, images()))
    assert net.training


def test_the_prior_term_of_the_papers_schedule_is_about_1e_5():
    """Section 4: L_T is about 1e-5 bits per dimension."""
    assert 1e-6 < bits_per_dim(gaussian_oracle(0.5), images(), timesteps_per_image=1).prior < 4e-5


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_rate_of_gaussian_images_is_its_closed_form(variance):
    """With the best eps, MSE_t = abar s^2 / (abar s^2 + 1 - abar): the rate is known without any image."""
    std, (beta, alpha, abar) = 0.25, numpy_tables(BETAS, T)
    found = bits_per_dim(gaussian_oracle(std), gaussian_images(std, 40), variance)
    beta, alpha, before, abar = beta[2:], alpha[2:], abar[1:-1], abar[2:]
    posterior = (1 - before) / (1 - abar) * beta
    sigma2 = beta if variance == "large" else posterior
    mse = abar * std**2 / (abar * std**2 + 1 - abar)
    c = 0.5 * (np.log(sigma2 / posterior) - 1 + posterior / sigma2)
    prior = 0.5 * (abar[-1] * std**2 - abar[-1] - np.log1p(-abar[-1]))
    rate = ((c + beta**2 / (2 * sigma2 * alpha * (1 - abar)) * mse).sum() + prior) / np.log(2)
    assert found.rate == pytest.approx(rate, abs=4 * found.standard_error)
    assert found.standard_error < 0.05


def test_gaussian_images_are_coded_in_little_more_than_their_entropy():
    """The entropy is h(N(0, s^2)) and log2 of the levels in a unit; the bound of the best eps model is close above."""
    std, batch = 0.25, gaussian_images(0.25, 40)
    entropy = math.log2(to_model_range(batch).std().item() * math.sqrt(2 * math.pi * math.e) * 127.5)
    abar = gaussian_oracle(std).schedules_float64["alphas_cumprod"]
    oracle = DiffusionModel(LinearDenoiser(torch.tensor(0.0), torch.tensor(std**2), abar), BETAS, T)
    found = bits_per_dim(oracle, batch)
    assert entropy < found.total < entropy + 0.2
    assert found.total == pytest.approx(bits_per_dim(gaussian_oracle(std), batch).total, abs=1e-4)


def test_drawn_timesteps_estimate_the_whole_sum_within_their_error():
    batch = images(40)
    model = gaussian_oracle(0.5)
    whole, part = bits_per_dim(model, batch), bits_per_dim(model, batch, timesteps_per_image=50)
    assert part.total != whole.total
    assert part.total == pytest.approx(whole.total, abs=4 * part.standard_error)
    assert part.terms.shape == (50,)
    assert part.bounds[[0, -1]].tolist() == [2, 1001]


def test_batch_size_changes_rounding_only_and_the_mode_is_restored(device):
    model = gaussian_oracle(0.5, (0.01, 0.3), 20).to(device)
    whole = bits_per_dim(model, images(), clip_x0=True)
    parts = bits_per_dim(model, images(), clip_x0=True, batch_size=5)
    assert parts.total == pytest.approx(whole.total, rel=1e-6)
    assert model.training


def test_a_batch_is_transferred_once_however_many_its_timesteps(monkeypatch):
    model, counts, transfer = gaussian_oracle(0.5, (0.01, 0.3), 20), [], torch.Tensor.cpu
    for timesteps_per_image in (2, 19):
        calls = []
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor, calls=calls: calls.append(tensor) or transfer(tensor))
        measure_errors(model, images(), timesteps_per_image=timesteps_per_image)
        counts.append(len(calls))
    assert counts == [3, 3]  # two of them for the decoder, which is computed on the CPU


def test_clipping_helps_a_network_that_leaves_the_range():
    wild = DiffusionModel(Lambda(lambda x, t: -2 * x), (0.01, 0.3), 20)
    errors = measure_errors(wild, images())
    assert summarise(wild, errors, clip_x0=True).total < summarise(wild, errors, clip_x0=False).total


def test_all_predictions_of_the_same_knowledge_have_the_same_bound():
    """A network that predicts x_0 or v, computed from the best eps, knows neither more nor less."""
    abar = gaussian_oracle(0.5).schedules_float64["alphas_cumprod"]

    def turned(prediction):
        def output(x, t):
            a = abar[(t * T).round().long()][:, None, None, None]
            eps = (1 - a).sqrt() * x.double() / (a * 0.25 + 1 - a)
            x_0 = (x.double() - (1 - a).sqrt() * eps) / a.sqrt()
            return {"eps": eps, "x_0": x_0, "v": a.sqrt() * eps - (1 - a).sqrt() * x_0}[prediction]

        return DiffusionModel(Lambda(output), BETAS, T, prediction=prediction)

    values = [bits_per_dim(turned(name), images(), timesteps_per_image=40).total for name in ("eps", "x_0", "v")]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_a_process_of_one_or_two_timesteps_has_a_bound():
    for num_timesteps, columns in ((1, 0), (2, 1)):
        model = DiffusionModel(Lambda(lambda x, t: 0 * x), (0.1, 0.5), num_timesteps)
        found = bits_per_dim(model, images())
        assert math.isfinite(found.total)
        assert (found.num_timesteps, found.timesteps_per_image) == (num_timesteps, columns)


def test_the_cosine_schedule_can_be_measured():
    model = DiffusionModel(Lambda(lambda x, t: 0 * x), cosine_betas(50), 50)
    assert math.isfinite(bits_per_dim(model, images()).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "medium"}, "variance must be one of"),
        ({"timesteps_per_image": 0}, r"must be in 1\.\.999 \(T - 1\), got 0"),
        ({"timesteps_per_image": 1000}, r"got 1000"),
        ({"images": torch.zeros(1, 3, 4, 4)}, "must be uint8"),
    ],
)
def test_wrong_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(gaussian_oracle(0.5), options.pop("images", images()), **options)


def test_the_linear_denoiser_is_optimal_for_correlated_gaussian_data():
    """E[eps | x_t] by the conditional mean of a joint Gaussian, written out for two dimensions."""
    mean, covariance = torch.tensor([0.3, -0.1]), torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    abar = torch.tensor([1.0, 0.8, 0.3], dtype=torch.float64)
    net = LinearDenoiser(mean, covariance, abar)
    x = torch.randn(5, 2)
    for timestep in (1, 2):
        a = abar[timestep].float()
        total = a * covariance + (1 - a) * torch.eye(2)  # Cov(x_t); Cov(eps, x_t) = sqrt(1 - abar) I
        expected = (1 - a).sqrt() * (x - a.sqrt() * mean) @ torch.linalg.inv(total)
        torch.testing.assert_close(net(x, torch.full((5,), timestep / 2)), expected)


def test_the_linear_denoiser_learns_mean_and_covariance_from_images():
    x = torch.randn(500, 1, 2, 2) * torch.tensor([[1.0, 0.5], [0.2, 0.1]]) + 0.3
    net = fit_linear_denoiser(x, torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(net.mean, x.flatten(1).mean(0))
    torch.testing.assert_close(net.eigenvalues, torch.linalg.eigvalsh(torch.cov(x.flatten(1).T)), atol=1e-5, rtol=1e-4)
    isotropic = fit_linear_denoiser(x, torch.tensor([1.0, 0.5], dtype=torch.float64), is_isotropic=True)
    assert isotropic.get_buffer("eigenvalues").item() == pytest.approx(x.var().item(), rel=1e-5)
