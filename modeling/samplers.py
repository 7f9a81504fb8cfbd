"""The family of samplers, ancestral to second order, and images that are a function of their number.

All walk down the same timesteps with the same network; they differ in one line, how x_t becomes the x of the timestep
after it. abar is the product of alphas at a timestep; a sampler knows the two timesteps by it alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.diffusion import VARIANCES, Bar, DiffusionModel, check_choice, evaluating, starting_noise
from modeling.runtime import autocast
from modeling.seeding import image_noise

# (x, eps, x_0, abar, abar of the next timestep, source of noise) -> x at the next timestep
Update = Callable[[Tensor, Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor]


def ancestral(variance: str = "small") -> Update:
    """Sampling from p(x_s | x_t) of the chain that has these timesteps only (Ho et al. 2020, Algorithm 2, eq. 7).

    Args:
        variance: "small" for the posterior variance, "large" for the chain's own beta = 1 - abar_t / abar_s; the last
            step adds no noise.

    Raises:
        ValueError: for another variance.
    """
    check_choice("variance", variance, VARIANCES)

    def update(x: Tensor, eps: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Callable) -> Tensor:
        alpha = abar / abar_next
        mean = (abar_next**0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - abar_next) * x) / (1 - abar)
        if abar_next == 1:
            return mean
        factor = 1.0 if variance == "large" else (1 - abar_next) / (1 - abar)
        return mean + (factor * (1 - alpha)) ** 0.5 * noise()

    return update


def ddim(eta: float = 0.0) -> Update:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.

    Args:
        eta: in [0, 1]; 0 is deterministic, the probability-flow ODE to first order; 1 is `ancestral("small")`. The
            noise that a larger one adds lets later steps correct earlier errors, which an undertrained network needs.

    Raises:
        ValueError: for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")

    def update(x: Tensor, eps: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Callable) -> Tensor:
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = abar_next**0.5 * x_0 + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps
        return x + sigma * noise() if sigma > 0 else x

    return update


def dpm_solver() -> Update:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): the same ODE to second order, deterministic.

    Its time is lambda = log(sqrt(abar) / sqrt(1 - abar)). The first step, which has no predecessor, and the last one,
    which is infinitely long in lambda, are of first order.
    """
    previous: tuple[Tensor, float] | None = None  # x_0 and lambda one step before

    def update(x: Tensor, eps: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Callable) -> Tensor:
        nonlocal previous
        before, time = previous, _log_snr(abar) / 2
        previous = x_0, time
        if abar_next == 1:
            return x_0
        step = _log_snr(abar_next) / 2 - time
        if before is not None:
            ratio = step / (2 * (time - before[1]))
            x_0 = (1 + ratio) * x_0 - ratio * before[0]  # extrapolated to the middle of the step
        return ((1 - abar_next) / (1 - abar)) ** 0.5 * x - abar_next**0.5 * math.expm1(-step) * x_0

    return update


def _log_snr(abar: float) -> float:
    return math.log(abar / (1 - abar))


SAMPLERS = {"ancestral": ancestral, "ddim": ddim, "dpm_solver": dpm_solver}


def respaced_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """num_steps timesteps out of 1..T, evenly spaced, descending from T.

    Raises:
        ValueError: unless 1 <= num_steps <= T.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must lie in 1..{num_timesteps}, got {num_steps}")
    return [round(i * num_timesteps / num_steps) for i in range(num_steps, 0, -1)]


def sample(
    model: DiffusionModel,
    num_samples: int,
    size: Sequence[int],
    device: torch.device | str,
    *,
    sampler: str = "ancestral",
    num_steps: int | None = None,
    clip_x0: bool = True,
    noise: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
    bar: Bar = iter,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    **options,
) -> Tensor:
    """Samples with any sampler on any number of evenly spaced timesteps, in eval mode and without gradients.

    Args:
        sampler: a name in `SAMPLERS`.
        num_steps: evaluations of the network, at most T; all T if not given.
        clip_x0: clips each predicted x_0 to [-1, 1] and takes the noise that belongs to it. Needed where the network
            is undertrained.
        observe: called before each step with (timestep, x_t, the predicted x_0).
        options: of the sampler: `variance` of ancestral, `eta` of ddim.

    Other arguments and the result are those of `DiffusionModel.sample`.

    Raises:
        ValueError: for an unknown sampler, num_steps outside 1..T, noise of another shape, or as the sampler.
    """
    check_choice("sampler", sampler, tuple(SAMPLERS))
    update = SAMPLERS[sampler](**options)
    timesteps = respaced_timesteps(model.num_timesteps, num_steps or model.num_timesteps)
    x, step_noise = starting_noise(num_samples, size, device, noise, step_noise, generator)
    abars = model.schedules_float64["alphas_cumprod"].tolist()
    with evaluating(model):
        for timestep, following in bar(list(zip(timesteps, [*timesteps[1:], 0], strict=True))):
            abar = abars[timestep]
            eps, x_0 = model.predict(x, timestep)
            if clip_x0:
                x_0 = x_0.clamp(-1, 1)
                eps = (x - abar**0.5 * x_0) / (1 - abar) ** 0.5
            if observe is not None:
                observe(timestep, x, x_0)
            x = update(x, eps, x_0, abar, abars[following], lambda timestep=timestep: step_noise(timestep))
    return x


def sample_images(
    model: DiffusionModel,
    num_samples: int,
    size: Sequence[int],
    device: torch.device | str,
    *,
    seed: int,
    first_image: int = 0,
    precision: str = "fp32",
    **options,
) -> Tensor:
    """`sample` for numbered images: each a function of the model, the seed and its number, whatever else is in the
    batch (up to rounding).

    Args:
        first_image: number of the first; the others follow.
        precision: "fp32", or "bf16" or "fp16" for the network's matrix products; the steps between them are float32.
        options: of `sample`, beside its noise.

    Returns:
        (B, *size), about [-1, 1].
    """
    drawn = image_noise(seed, torch.arange(first_image, first_image + num_samples, device=device), size)
    with autocast(device, precision):
        return sample(model, num_samples, size, device, noise=drawn(0), step_noise=drawn, **options)
