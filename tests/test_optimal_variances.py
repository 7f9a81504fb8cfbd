"""The variances with which the bound is least."""

import math

import numpy as np
import pytest
import torch

from modeling.diffusion import DiffusionModel
from modeling.evaluation import measure_errors, optimal_variances, summarise
from modeling.images import to_model_range, to_uint8
from tests.helpers import BETAS, Lambda, T, gaussian_oracle, numpy_tables, random_images

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("clip_x0", [False, True])
def test_no_other_variance_has_a_lower_bound_on_the_images_it_was_computed_from(clip_x0):
    """Of the rate, each term, and of L_0 for levels that are fine beside its Gaussian."""
    num_timesteps = 7
    model = DiffusionModel(Lambda(lambda x, t: torch.tanh(x) * t[:, None, None, None]), (0.01, 0.3), num_timesteps)
    batch = random_images(12, 3, 4, 4)
    errors = measure_errors(model, batch)
    best = optimal_variances(model, errors, clip_x0=clip_x0)

    def bound(variances):
        errors = measure_errors(model, batch, decoder_variance=variances[0].item())
        return summarise(model, errors, variances, clip_x0=clip_x0)

    least = bound(best)
    for t in range(num_timesteps):
        for factor in (0.9, 1.1):
            other = best.clone()
            other[t] *= factor
            assert bound(other).total > least.total
    for variance in ("large", "small"):
        given = torch.tensor([model.p_variance(max(t, 2), variance) for t in range(1, num_timesteps + 1)])
        named = summarise(model, errors, variance, clip_x0=clip_x0)
        torch.testing.assert_close(summarise(model, errors, given.double(), clip_x0=clip_x0).terms, named.terms)
        assert (least.terms < named.terms).all()


def test_the_optimal_variance_of_gaussian_data_is_that_of_the_reversed_chain():
    """q(x_{t-1} | x_t) is then a Gaussian, known in closed form, and the bound with it is the entropy itself."""
    std, (beta, _, abar) = 0.25, numpy_tables(BETAS, T)
    model = gaussian_oracle(std)
    batch = to_uint8(std * torch.randn(40, 3, 8, 8, generator=torch.manual_seed(0)))
    found = optimal_variances(model, measure_errors(model, batch))
    marginal = abar * std**2 + 1 - abar  # of x_t
    np.testing.assert_allclose(found, marginal[:-1] * beta[1:] / marginal[1:], rtol=0.03)
    entropy = math.log2(to_model_range(batch).std().item() * math.sqrt(2 * math.pi * math.e) * 127.5)
    errors = measure_errors(model, batch, decoder_variance=found[0].item())
    assert summarise(model, errors, found).total == pytest.approx(entropy, abs=0.02)
