"""Samplers beyond the ancestral one of `DiffusionModel.sample`, and images that are a function of their number."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.diffusion import Bar, DiffusionModel, evaluating, starting_noise
from modeling.runtime import autocast
from modeling.seeding import image_noise


def respaced_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """num_steps timesteps out of 1..T, evenly spaced, descending from T.

    Raises:
        ValueError: unless 1 <= num_steps <= T.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must lie in 1..{num_timesteps}, got {num_steps}")
    return [round(i * num_timesteps / num_steps) for i in range(num_steps, 0, -1)]


def sample_respaced(
    model: DiffusionModel,
    num_samples: int,
    size: Sequence[int],
    device: torch.device | str,
    *,
    num_steps: int,
    eta: float = 1.0,
    clip_x0: bool = True,
    noise: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
    bar: Bar = iter,
) -> Tensor:
    """Generalised sampling on a subset of the timesteps (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

    For an undertrained network eta = 1 with clipping is clean in 50-100 steps where eta = 0 leaves noise: the noise it
    adds lets later steps correct earlier errors.

    Args:
        num_steps: evaluations of the network, at most T.
        eta: 0 is DDIM (deterministic); 1 is ancestral with the posterior variance.
        clip_x0: clips each predicted x_0 to [-1, 1] and takes the noise that belongs to it.

    Other arguments and the result are those of `DiffusionModel.sample`.

    Raises:
        ValueError: for num_steps outside 1..T, a negative eta or noise of another shape.
    """
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    timesteps = respaced_timesteps(model.num_timesteps, num_steps)
    x, step_noise = starting_noise(num_samples, size, device, noise, step_noise, generator)
    abars = model.schedules_float64["alphas_cumprod"].tolist()
    with evaluating(model):
        for timestep, following in bar(list(zip(timesteps, [*timesteps[1:], 0], strict=True))):
            abar, abar_next = abars[timestep], abars[following]
            eps = model.predict_eps(x, torch.full((len(x),), timestep, device=x.device))
            x_0 = model.predict_x_0(x, eps, timestep)
            if clip_x0:
                x_0 = x_0.clamp(-1, 1)
                eps = (x - abar**0.5 * x_0) / (1 - abar) ** 0.5
            variance = eta**2 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
            x = abar_next**0.5 * x_0 + max(1 - abar_next - variance, 0.0) ** 0.5 * eps
            if variance > 0:
                x = x + variance**0.5 * step_noise(timestep)
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
    """`sample_respaced` for numbered images: each a function of the model, the seed and its number, whatever else is in
    the batch (up to rounding).

    Args:
        first_image: number of the first; the others follow.
        precision: "fp32", or "bf16" for the network's matrix products; the steps between them are float32.
        options: of `sample_respaced`.

    Returns:
        (B, *size), about [-1, 1].
    """
    noise = image_noise(seed, torch.arange(first_image, first_image + num_samples, device=device), size)
    with autocast(device, precision):
        return sample_respaced(model, num_samples, size, device, noise=noise(0), step_noise=noise, **options)
