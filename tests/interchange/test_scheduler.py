"""The diffusion process, to and from diffusers."""

import pytest
import torch
from torch import Tensor

from modeling.diffusion import PREDICTIONS, DiffusionModel
from modeling.interchange.scheduler import diffusion_arguments, scheduler_config
from modeling.samplers import Sampler, sample
from modeling.schedules import cosine_betas, linear_betas, respaced_timesteps, schedule_tables
from modeling.system.errors import UserError
from tests.helpers import Lambda

PROCESSES = {"linear": ([2e-4, 0.03], linear_betas(2e-4, 0.03, 1000)), "cosine": (None, cosine_betas(1000))}


@pytest.mark.parametrize("schedule", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_of_the_scheduler_is_ours_with_the_small_variance(diffusers, schedule, prediction):
    betas, table = PROCESSES[schedule]
    scheduler = diffusers.DDPMScheduler.from_config(scheduler_config(1000, schedule, betas, prediction))
    torch.testing.assert_close(
        scheduler.alphas_cumprod, schedule_tables(table)["alphas_cumprod"][1:].float(), atol=1e-6, rtol=1e-3
    )
    output = torch.randn(2, 3, 8, 8)
    model = DiffusionModel(Lambda(lambda x, t: output), table, 1000, prediction=prediction)
    x = torch.randn(2, 3, 8, 8)
    for timestep in (1000, 600, 30, 1):
        generator = torch.Generator().manual_seed(timestep)
        expected = scheduler.step(output, timestep - 1, x, generator=generator).prev_sample
        found = model.p_mean(x, timestep, clip_x0=True)
        if timestep > 1:
            z = torch.randn(x.shape, generator=generator.manual_seed(timestep))
            found = found + model.p_variance(timestep, "small") ** 0.5 * z
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_an_exported_scheduler_samples_as_we_do_at_our_timesteps(diffusers, num_steps):
    betas, table = PROCESSES["linear"]
    abars = schedule_tables(table)["alphas_cumprod"]
    config = scheduler_config(1000, "linear", betas, "eps")
    for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(num_steps)
        assert [timestep + 1 for timestep in scheduler.timesteps.tolist()] == respaced_timesteps(abars, num_steps)
    scheduler = diffusers.DDPMScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    model = DiffusionModel(Lambda(lambda x, t: torch.tanh(x)), table, 1000)
    x, generator = torch.randn(2, 3, 8, 8), torch.Generator().manual_seed(1)
    start, noise = x, torch.Generator().manual_seed(1)
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), timestep, x, generator=generator).prev_sample

    def draw(timestep: int) -> Tensor:
        return start if timestep == 0 else torch.randn(x.shape, generator=noise)

    found = sample(model, 2, (3, 8, 8), "cpu", Sampler(num_steps=num_steps), noise=draw)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_process_comes_back(schedule, prediction):
    process = {"num_timesteps": 1000, "schedule": schedule, "betas": PROCESSES[schedule][0], "prediction": prediction}
    assert diffusion_arguments(scheduler_config(**process)) == process


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((200, "linear", [1e-4, 0.02], "eps"), r"num_timesteps must be one of \[1000\] for diffusers, got 200"),
        (
            (1000, "sigmoid", None, "eps"),
            r"schedule must be one of \['linear', 'cosine'\] for diffusers, got 'sigmoid'",
        ),
        ((1000, "linear", [1e-4, 0.02], "score"), "prediction must be one of .* got 'score'"),
        ((1000, "linear", None, "eps"), "betas must be two numbers with schedule=linear.*got None with linear"),
        ((1000, "cosine", [1e-4, 0.02], "eps"), "betas must be .* else null, got .* with cosine"),
    ],
)
def test_a_process_that_diffusers_does_not_have_is_rejected(values, message):
    with pytest.raises(UserError, match=message):
        scheduler_config(*values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 4000}, r"num_train_timesteps must be one of \[1000\], got 4000"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule must be one of .* got 'scaled_linear'"),
        ({"prediction_type": "flow"}, "prediction_type must be one of .* got 'flow'"),
        ({"trained_betas": [0.1]}, r"trained_betas must not be set, got \[0.1\]"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must not be set, got True"),
    ],
)
def test_a_scheduler_whose_process_we_do_not_have_is_rejected(config, message):
    with pytest.raises(UserError, match=message):
        diffusion_arguments(config)
