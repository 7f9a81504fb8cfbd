"""The error of few steps is the distance from the ODE's solution, which is known for Gaussian data."""

import itertools

import pytest
import torch

from modeling.config import parse
from modeling.diffusion import DiffusionModel
from modeling.measures.linear_denoiser import LinearDenoiser
from modeling.measures.solver_error import SolverMeasure
from modeling.measures.subject import Subject
from modeling.measures.trained import TrainedModel
from modeling.options import EvaluateConfig
from modeling.samplers import Sampler, sample_images
from modeling.schedules import SPACINGS, linear_betas, schedule_tables
from modeling.seeding import image_noise
from tests.helpers import Lambda

pytestmark = pytest.mark.numeric
BETAS, LAST, SHAPE = (5e-4, 0.1), 200, (1, 2, 2)
ABARS = schedule_tables(linear_betas(*BETAS, LAST))["alphas_cumprod"]
VARIANCES = torch.tensor([0.8, 0.3, 0.05, 0.01])


@pytest.fixture
def measured(compose_config):
    """The measure, of a function as eps model."""

    def measure_with(net, *overrides: str, last: int = LAST) -> SolverMeasure:
        machine = ["checkpoint=none", "device=cpu", "precision=fp32", "seed=1", "clip_x0=false", "solver_images=6"]
        options = parse(compose_config(*machine, *overrides, name="evaluate"), EvaluateConfig)
        trained = TrainedModel(options, DiffusionModel(net, BETAS, last), {}, SHAPE)
        return SolverMeasure(Subject(trained, None, None, options))  # type: ignore[arg-type]

    return measure_with


def test_errors_are_the_distances_from_the_solution_that_gaussian_data_have(measured):
    mean = torch.tensor([0.3, -0.2, 0.1, 0.0])
    measure = measured(LinearDenoiser(mean, torch.diag(VARIANCES), ABARS))

    def sample(name: str, num_steps: int, spacing: str = "trailing") -> torch.Tensor:
        sampler = Sampler(name, num_steps, clip_x0=False, spacing=spacing)
        return sample_images(measure.trained.model, 6, SHAPE, "cpu", sampler, seed=1).flatten(1)

    x_last = image_noise(1, torch.arange(6), SHAPE)(0).flatten(1)
    scale = (VARIANCES / (ABARS[-1] * VARIANCES + 1 - ABARS[-1])).sqrt()
    taken = sample("dpm_solver", LAST)
    torch.testing.assert_close(taken, mean + scale * (x_last - ABARS[-1].sqrt() * mean), atol=0.01, rtol=0)
    values = measure.take()["values"]
    for name, num_steps, spacing in itertools.product(("ddim", "dpm_solver"), (10, 20, 50), SPACINGS):
        error = (sample(name, num_steps, spacing) - taken).square().mean(1).sqrt().mean().item()
        assert values[f"rms, {name} {num_steps}"][spacing] == pytest.approx(error, rel=1e-4)
    for name in ("ddim", "dpm_solver"):
        assert values[f"rms, {name} 50"]["trailing"] < values[f"rms, {name} 10"]["trailing"]
    assert values["rms, ddim 200"]["trailing"] < values["rms, ddim 50"]["trailing"] / 2


def test_images_are_measured_one_by_one(measured):
    """So neither the batch nor the other images change an error, and the standard error is that of independent ones."""
    net = LinearDenoiser(torch.zeros(4), torch.diag(VARIANCES), ABARS)
    whole = measured(net, "batch_size=6")._measure_errors()
    torch.testing.assert_close(measured(net, "batch_size=4")._measure_errors(), whole)
    record = measured(net, "solver_images=3").take()
    values, first = record["values"], whole[0, :3].double()  # ddim, 10 steps, trailing
    assert record["identity"]["num_images"] == 3
    assert values["rms, ddim 10"]["trailing"] == pytest.approx(first.mean().item(), rel=1e-4)
    assert values["standard error, ddim 10"]["trailing"] == pytest.approx(first.std().item() / 3**0.5, rel=1e-4)


def test_only_steps_that_the_model_has_are_taken(measured):
    values = measured(Lambda(lambda x, t: x / 2), "num_steps=20", last=20).take()["values"]
    assert [name for name in values if name.startswith("rms")] == ["rms, ddim 10", "rms, dpm_solver 10", "rms, ddim 20"]


def test_a_network_that_predicts_no_numbers_is_an_error(measured):
    with pytest.raises(FloatingPointError, match="a sample is not finite in fp32"):
        measured(Lambda(lambda x, t: x * float("nan"))).take()
